"""Workers train on images, without Ray: a step depends on neither ranks nor micro-batches, at any ZeRO stage.

Of two ranks, the first has all images. The second must still pass an image through the tower where ranks wait there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf.models.files.tiny_vision import build_tiny_vision
from rlhf.tracking.metrics.declarations import merge_metrics, results
from tests.integration.gang_workers import assert_equal
from tests.integration.rank_gang import Gangs
from tests.integration.vision_training import imitate_rank, resume_rank, train_rank

# The worker, the ZeRO stage, and the tower's learning rate or None: frozen.
CASES = [
    ("grpo", 0, 1e-3),
    ("grpo", 2, None),
    ("grpo", 3, 1e-3),
    ("ppo", 3, None),
    ("ppo", 2, 1e-3),
    ("sft", 2, 1e-3),
    ("sft", 3, None),
    ("dpo", 2, 1e-3),
    ("kto", 2, 1e-3),
    ("reward_model", 3, 1e-3),
    ("process_reward_model", 2, 1e-3),
    ("streamed", 2, 1e-3),
    ("online_dpo", 3, 1e-3),
    ("sampled_teacher", 2, None),
    ("whole_teacher", 3, 1e-3),
]


def trained(gangs: Gangs, folder: Path, kind: str, *, ranks: int, **options: Any) -> tuple[Any, float, float]:
    """Return the metrics of two steps, and the largest change of a tower's weight and of another weight."""
    model = str(build_tiny_vision(folder / kind, kind, seed=0))
    tokens = 4096 if ranks == 1 else 96
    found = gangs[ranks].run(train_rank, model=model, folder=str(folder), tokens=tokens, **options)
    steps = [results(merge_metrics([one[i] for one in found])) for i in range(2)]
    assert all(one[2:] == found[0][2:] for one in found)
    return steps, found[0][2], found[0][3]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "stage", "vision_lr"), CASES)
def test_a_step_with_images_depends_on_neither_ranks_nor_microbatches(
    gangs: Gangs, tmp_path: Path, name: str, stage: int, vision_lr: float | None
) -> None:
    options: dict[str, Any] = {"name": name, "vision_lr": vision_lr}
    one, tower, others = trained(gangs, tmp_path, "qwen3_vl", ranks=1, zero_stage=0, **options)
    two, tower_of_two, _ = trained(gangs, tmp_path, "qwen3_vl", ranks=2, zero_stage=stage, **options)
    norm = next(key for key in one[0] if key.endswith("grad_norm"))
    assert one[0][norm] > 0
    assert_equal(one, two)
    assert others > 1e-6
    assert (tower > 1e-6) == (tower_of_two > 1e-6) == (vision_lr is not None)
    assert vision_lr is not None or tower == tower_of_two == 0.0


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5", "mistral3", "idefics3"])
def test_other_kinds_of_models_train_sharded_too(gangs: Gangs, tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {"name": "grpo", "vision_lr": 1e-3}
    one, *_ = trained(gangs, tmp_path, kind, ranks=1, zero_stage=0, **options)
    two, *_ = trained(gangs, tmp_path, kind, ranks=2, zero_stage=3, **options)
    assert_equal(one, two)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("stage", "vision_lr"), [(2, None), (3, None), (2, 1e-3)])
def test_a_resumed_model_goes_on_with_the_same_numbers(
    gangs: Gangs, tmp_path: Path, stage: int, vision_lr: float | None
) -> None:
    """A checkpoint leaves a frozen tower out. An export takes the tower from the model's folder."""
    model = str(build_tiny_vision(tmp_path / "m", "qwen2_vl", seed=0))
    (tmp_path / "saved").mkdir()
    shared: dict[str, Any] = {"model": model, "folder": str(tmp_path), "saved": str(tmp_path / "saved")}
    shared |= {"tokens": 96, "zero_stage": stage, "vision_lr": vision_lr}
    first, again = (gangs[2].run(resume_rank, saves=saves, **shared) for saves in (True, False))
    steps = [[results(merge_metrics([rank[1] for rank in ranks]))] for ranks in (first, again)]
    assert_equal(*steps, rel=1e-9)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_file_of_rows_with_images_teaches_what_only_the_images_tell(gangs: Gangs, tmp_path: Path) -> None:
    (losses,) = gangs[1].run(imitate_rank, folder=str(tmp_path), steps=30)
    assert losses[0] > 10.0
    assert losses[-1] < 1.0  # a blind model guesses one of four colours: at best log(4) = 1.39 nats an answer

"""Real DeepSpeed on gloo, for every ZeRO stage, one rank and two, agrees with plain torch AdamW on the whole batch.

The loss is a sum over the optimizer step, so the result must not depend on ranks or micro-batches.
"""

from __future__ import annotations

import importlib.util
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from rlhf.errors import RunError, UserError
from tests.integration.engine_training import (
    LENGTHS,
    OPTIMIZER,
    SCHEDULE,
    STEPS,
    batch,
    distance,
    interrupt_and_resume,
    loss_of,
    make_engine,
    plain_training,
    tiny_model,
    train,
    weights_of,
)
from tests.integration.rank_gang import Gang, Gangs
from tests.no_pickles import kinds_of


def train_and_publish(rank: int, world_size: int, *, stage: int) -> dict[str, Tensor]:
    """Train with buckets of gradients smaller than a layer."""
    with mock.patch("rlhf.engine.deepspeed.BUCKET_ELEMENTS", SMALL_BUCKET):
        engine = make_engine(stage)
    train(engine, rank, world_size, steps=range(1, STEPS + 1), num_microbatches=1)
    weights = weights_of(engine)
    engine.close()
    return weights


def train_on_sums(
    rank: int, world_size: int, *, stage: int, dtype: torch.dtype, folder: Path
) -> tuple[dict[str, Tensor], list[float], dict[str, Tensor], list[float]]:
    """Return weights and norms of training on means, and of training on sums divided in the step.

    Between the passes on sums, other sequences are measured, as in a step with groups that arrive in turn, and a
    snapshot is written, as at the end of a run. Every second step ends with a pass that adds nothing.
    """
    divisor = float(sum(LENGTHS) - len(LENGTHS))
    engine = make_engine(stage, dtype)
    norms = train(engine, rank, world_size, steps=range(1, STEPS + 1), num_microbatches=2)
    weights = weights_of(engine)
    engine.close()
    engine, norms_of_sums = make_engine(stage, dtype), []
    for step in range(1, STEPS + 1):
        mine, ends_empty = batch(step)[rank::world_size], step % 2 == 1
        for i, sequence in enumerate(mine):
            is_last = i == len(mine) - 1
            engine.backward(divisor * engine.forward(loss_of, [sequence]), last=is_last and not ends_empty)
            if not is_last:
                with torch.no_grad():
                    engine.forward(loss_of, mine)
                engine.save(folder)
        if ends_empty:
            engine.backward(0.0 * engine.forward(loss_of, mine[:1]), last=True)
        norms_of_sums.append(engine.step(divisor).grad_norm)
    weights_of_sums = weights_of(engine)
    engine.close()
    return weights, norms, weights_of_sums, norms_of_sums


def try_nonfinite(rank: int, world_size: int, *, stage: int, dtype: torch.dtype, where: str) -> tuple[str, bool]:
    """Return the message of the refusal, and whether the weights are unchanged. Only the last rank's loss is bad."""
    engine = make_engine(stage, dtype)
    before = weights_of(engine)
    loss = engine.forward(loss_of, batch(1)[rank::world_size])
    if rank == world_size - 1:
        finite_value = loss + (loss - loss.detach()).sqrt()  # its gradient is not finite: d sqrt(x) / dx at 0
        loss = loss * float("nan") if where == "loss" else finite_value
    engine.backward(loss, last=True)
    with pytest.raises(RunError) as caught:
        engine.step()
    after = weights_of(engine)
    engine.close()
    return str(caught.value), all(torch.equal(after[name], before[name]) for name in before)


SMALL_BUCKET = 1000
OTHER_SETTINGS = replace(OPTIMIZER, betas=(0.5, 0.8), eps=1e-3, weight_decay=2.0)
NO_DECAY = replace(OPTIMIZER, weight_decay=0.0)  # puts all weights into one group


def load_with_other_settings(rank: int, world_size: int, *, stage: int, folder: Path) -> list[dict[str, Tensor]]:
    """Return weights after a resume with the same settings, and with others at the same and at another stage."""
    engine, found = make_engine(stage), []
    train(engine, rank, world_size, steps=range(1, 2), num_microbatches=1)
    engine.save(folder)
    engine.close()
    changes = [(other, s) for other in (OTHER_SETTINGS, NO_DECAY) for s in (stage, (stage + 1) % 4)]
    for optimizer, next_stage in ((OPTIMIZER, stage), *changes):
        engine = make_engine(next_stage, optimizer=optimizer)
        engine.load(folder)
        train(engine, rank, world_size, steps=range(2, 4), num_microbatches=1)
        found.append(weights_of(engine))
        engine.close()
    twice = replace(SCHEDULE, warmup_steps=2 * SCHEDULE.warmup_steps, updates_per_step=2)
    engine = make_engine(stage, schedule=twice)  # each training step now has two updates
    engine.load(folder)
    engine.backward(engine.forward(loss_of, batch(2)[rank::world_size]), last=True)
    assert engine.step().lr == OPTIMIZER.lr * 3 / 4  # third of 4 updates of the rise
    engine.close()
    return found


class Hostile:
    """A pickle that writes a file on loading."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def load_hostile(rank: int, world_size: int, *, stage: int, dtype: torch.dtype, folder: Path) -> list[str]:
    """Return the messages about a checkpoint with a pickle in place of each file in turn."""
    marker = folder.parent / "ran"
    engine = make_engine(stage, dtype)
    engine.save(folder)
    engine.close()
    engine = make_engine(stage, dtype)
    messages = []
    for path in sorted(path for path in folder.rglob("*") if path.name != "engine.json"):
        sound = path.read_bytes()
        for as_zip in (True, False):
            torch.save({"module": Hostile(marker)}, path) if as_zip else path.write_bytes(pickle.dumps(Hostile(marker)))
            with pytest.raises(UserError) as caught:
                engine.load(folder)
            messages.append(str(caught.value))
            assert not marker.exists(), path
        path.write_bytes(sound)
    for text in ("", "[]", "null", "[" * 100_000, '{"steps": "1"}', "{}"):
        (folder / "engine.json").write_text(text)
        with pytest.raises(UserError, match=r"is not a whole snapshot|engine\.json does not hold the state"):
            engine.load(folder)
    engine.close()
    return messages


FILES = {"engine.json": "JSON", "random_00000.json": "JSON", "state_00000.safetensors": "safetensors"}  # of one rank


def mlflow_of(rank: int, world_size: int) -> tuple[bool, bool]:
    """Return whether MLflow is imported, and whether it can be."""
    return "mlflow" in sys.modules, importlib.util.find_spec("mlflow") is not None


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}rank")
def gang(request: pytest.FixtureRequest, gangs: Gangs) -> Gang:
    return gangs[request.param]


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return plain_training()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_equals_plain_adamw_on_the_whole_batch(gang: Gang, stage: int, expected: dict[str, Tensor]) -> None:
    assert max(map(torch.Tensor.numel, expected.values())) > SMALL_BUCKET
    for weights in gang.run(train_and_publish, stage=stage):
        assert weights.keys() == expected.keys()
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_sum_divided_in_the_step_equals_a_mean(
    gang: Gang, stage: int, dtype: torch.dtype, expected: dict[str, Tensor], tmp_path: Path
) -> None:
    """The clip acts on the divided gradient: the norms are above the clip of 0.5 and below 0.5 times the divisor."""
    before = {name: weight.float() for name, weight in tiny_model(dtype).named_parameters()}
    results = gang.run(train_on_sums, stage=stage, dtype=dtype, folder=tmp_path / "snapshot")
    for weights, norms, weights_of_sums, norms_of_sums in results:
        assert min(norms) > 0.5
        assert max(norms) < 0.5 * (sum(LENGTHS) - len(LENGTHS))
        if dtype == torch.float32:
            assert norms_of_sums == pytest.approx(norms, rel=1e-5)
            torch.testing.assert_close(weights, expected, rtol=1e-4, atol=2e-6)
            torch.testing.assert_close(weights_of_sums, expected, rtol=1e-4, atol=1e-5)
        else:  # Adam moves a weight by its rate whatever the size of its gradient, and so amplifies rounding
            assert norms_of_sums == pytest.approx(norms, rel=2e-2)
            moved, apart = (distance(weights, other) for other in (before, weights_of_sums))
            assert apart < 0.1 * moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_resume_is_exact(gang: Gang, stage: int, dtype: torch.dtype, tmp_path: Path) -> None:
    for unbroken, resumed, norms, norms_again, same_draw in gang.run(
        interrupt_and_resume, stage=stage, dtype=dtype, folder=tmp_path
    ):
        assert norms == norms_again
        assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
        assert same_draw


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nonfinite_never_reaches_the_weights(gang: Gang, stage: int, dtype: torch.dtype, where: str) -> None:
    for message, unchanged in gang.run(try_nonfinite, stage=stage, dtype=dtype, where=where):
        assert "not finite in optimizer step 1" in message
        assert unchanged


def test_a_checkpoint_runs_no_code(gangs: Gangs, tmp_path: Path) -> None:
    for stage in (0, 1, 2, 3):
        for dtype in (torch.float32, torch.bfloat16):
            folder = tmp_path / f"{stage} {dtype}" / "checkpoint"
            folder.parent.mkdir()
            (messages,) = gangs[1].run(load_hostile, stage=stage, dtype=dtype, folder=folder)
            assert kinds_of(folder) == FILES
            assert len(messages) == 2 * (len(FILES) - 1)
            assert all(" cannot be read: " in message for message in messages)


@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 3))])
def test_the_optimizer_of_a_resumed_run_has_the_settings_of_its_configuration(
    gang: Gang, stage: int, tmp_path: Path
) -> None:
    for unchanged, *changed in gang.run(load_with_other_settings, stage=stage, folder=tmp_path):
        for same_stage, other_stage in (changed[:2], changed[2:]):
            torch.testing.assert_close(same_stage, other_stage, rtol=1e-4, atol=2e-6)
            assert distance(same_stage, unchanged) > 0.001


def test_a_rank_begins_without_mlflow_and_can_import_it(gangs: Gangs) -> None:
    assert gangs[2].run(mlflow_of) == [(False, True)] * 2

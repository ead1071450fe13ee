"""Before a run with a vision model: what the model cannot do, and models of other roles that would see otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForImageTextToText

from rlhf.errors import UserError
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.models.files.tiny_vision import KINDS, build_tiny_vision
from rlhf.planning.shapes import find_shape
from rlhf.preflight.models import StageResults, check_models
from tests.integration.gang_workers import worker_config


def check(model: Path, algorithm: dict[str, Any], **sections: Any) -> None:
    is_online = algorithm["name"] != "sft"
    config = worker_config(algorithm, str(model), str(model.parent), tokens=64, is_online=is_online, **sections)
    check_models(config, StageResults(), vocabulary_of=str(model))


def test_the_models_of_a_run_see_an_image_as_the_same_tokens(tmp_path: Path) -> None:
    policy = build_tiny_vision(tmp_path / "policy", "mistral3", seed=0)
    critic = {"model": str(build_tiny_vision(tmp_path / "same", "mistral3", seed=1)), "dtype": "float32"}
    check(policy, {"name": "ppo"}, critic=critic)
    other = {"model": str(build_tiny_vision(tmp_path / "other", "pixtral", seed=0)), "dtype": "float32"}
    with pytest.raises(UserError, match=r"critic\.model: .*sees an image as other tokens than policy\.model"):
        check(policy, {"name": "ppo"}, critic=other)
    blind = build_tiny_llama(tmp_path / "blind", seed=0)
    with pytest.raises(UserError, match=r"another vocabulary|reads text alone, but policy\.model"):
        check(policy, {"name": "ppo"}, critic={"model": str(blind), "dtype": "float32"})
    check(blind, {"name": "sft"})


def test_keys_without_a_meaning_for_a_model_are_refused(tmp_path: Path) -> None:
    policy = build_tiny_vision(tmp_path / "policy", "qwen3_vl", seed=0)
    check(policy, {"name": "sft"}, policy={"vision_lr": 1e-4})
    with pytest.raises(UserError, match=r"algorithm\.neftune_alpha: is 5, but .*sees images.*Set it to null"):
        check(policy, {"name": "sft", "neftune_alpha": 5.0})
    with pytest.raises(UserError, match=r"policy\.vision_lr: is 0\.0001, but .*has no vision tower\. Remove it"):
        check(build_tiny_llama(tmp_path / "blind", seed=0), {"name": "sft"}, policy={"vision_lr": 1e-4})


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "idefics3"])
def test_the_plan_counts_the_weights_of_the_tower(kind: str) -> None:
    shape = find_shape(f"tiny:{kind}", shapes=None, made={})
    model = AutoModelForImageTextToText.from_config(KINDS[kind]()[0])
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.tower == sum(p.numel() for name, p in model.named_parameters() if ".vis" in name or ".conn" in name)


def test_the_plan_refuses_a_decoder_without_a_model_of_its_memory() -> None:
    with pytest.raises(UserError, match="decoder of type gemma3_text, whose memory is not modelled; known are llama"):
        find_shape("tiny:gemma3", shapes=None, made={})

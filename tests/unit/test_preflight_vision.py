"""Before a run with a vision model: what the model cannot do, and models of other roles that would see otherwise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from rlhf.config.files.load import load
from rlhf.config.nodes import parse_cluster
from rlhf.config.schema.root import Config
from rlhf.errors import UserError
from rlhf.models.adapters.lora import add_lora
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.models.files.tiny_vision import KINDS, build_tiny_vision
from rlhf.planning.footprints import Sizes, sent_parameters
from rlhf.planning.lengths import Lengths
from rlhf.planning.memory import tower_bytes
from rlhf.planning.rates import Stage, rates
from rlhf.planning.report import response_lengths
from rlhf.planning.rows import mean_tokens_here
from rlhf.planning.shapes import find_shape
from rlhf.planning.time import system_of, tower_operations, training_stages
from rlhf.preflight.models import StageResults, check_models
from rlhf.vision.processor import ImageProcessing
from tests.fixtures.sources import ROOT
from tests.integration.gang_workers import worker_config
from tests.vision_models import drawn


def load_model(folder: Path, kind: str) -> Any:
    path = folder / kind
    if not path.exists():
        build_tiny_vision(path, kind, seed=0)
    return AutoModelForImageTextToText.from_pretrained(path)


def check(model: Path, algorithm: dict[str, Any], **sections: Any) -> None:
    is_online = algorithm["name"] != "sft"
    config = worker_config(algorithm, str(model), str(model.parent), tokens=64, is_online=is_online, **sections)
    check_models(config, StageResults(), vocabulary_of=str(model))


def test_the_models_of_a_run_see_an_image_as_the_same_tokens(tmp_path: Path) -> None:
    policy = build_tiny_vision(tmp_path / "policy", "mistral3", seed=0)
    critic = {"model": str(build_tiny_vision(tmp_path / "same", "mistral3", seed=1)), "dtype": "float32"}
    check(policy, {"name": "ppo"}, critic=critic)
    other = {"model": str(build_tiny_vision(tmp_path / "other", "pixtral", seed=0)), "dtype": "float32"}
    with pytest.raises(UserError, match=r"critic\.model: .*turns an image into different tokens than policy\.model"):
        check(policy, {"name": "ppo"}, critic=other)
    blind = build_tiny_llama(tmp_path / "blind", seed=0)
    with pytest.raises(UserError, match=r"another vocabulary|reads only text, but policy\.model"):
        check(policy, {"name": "ppo"}, critic={"model": str(blind), "dtype": "float32"})
    check(blind, {"name": "sft"})


def test_keys_without_a_meaning_for_a_model_are_refused(tmp_path: Path) -> None:
    policy = build_tiny_vision(tmp_path / "policy", "qwen3_vl", seed=0)
    check(policy, {"name": "sft"}, policy={"vision_lr": 1e-4})
    with pytest.raises(
        UserError, match=r"algorithm\.neftune_alpha: is 5, but .*sees images.*Set neftune_alpha to null"
    ):
        check(policy, {"name": "sft", "neftune_alpha": 5.0})
    with pytest.raises(UserError, match=r"policy\.vision_lr: is 0\.0001, but .*has no vision tower\. Remove the key"):
        check(build_tiny_llama(tmp_path / "blind", seed=0), {"name": "sft"}, policy={"vision_lr": 1e-4})


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "idefics3"])
def test_the_plan_counts_the_weights_of_the_tower(kind: str) -> None:
    shape = find_shape(f"tiny:{kind}", shapes=None, made={})
    model = AutoModelForImageTextToText.from_config(KINDS[kind]()[0])
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.tower.parameters == sum(
        p.numel() for name, p in model.named_parameters() if ".vis" in name or ".conn" in name
    )


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "idefics3", "pixtral"])
def test_the_plan_counts_an_adapter_of_the_tower(kind: str, tmp_path: Path) -> None:
    shape, model = find_shape(f"tiny:{kind}", shapes=None, made={}), load_model(tmp_path, kind)
    for vision in (False, True):
        adapted = add_lora(load_model(tmp_path, kind), rank=4, alpha=4.0, dropout=0.0, vision=vision)
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert shape.lora_parameters(4, vision=vision) == trained
    assert model.num_parameters() == shape.parameters


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "idefics3", "pixtral"])
def test_the_plan_counts_what_a_trained_tower_keeps(kind: str, tmp_path: Path) -> None:
    """Compare with the bytes that PyTorch saves for the backward pass of the tower, without the weights."""
    shape, model = find_shape(f"tiny:{kind}", shapes=None, made={}), load_model(tmp_path, kind)
    processing = ImageProcessing.of_model(str(tmp_path / kind))
    assert processing is not None
    inputs = processing.model_inputs([drawn(size=(64, 64))])
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()
        if place.data_ptr() not in weights:
            saved[place.data_ptr()] = place.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        features = model.get_image_features(**inputs)
    (embedded,) = {sum(token == processing.image_token_id for token in processing.expansion(64, 64))}
    expected = embedded * tower_bytes(shape, itemsize=4, checkpointing=False, trained=True)
    assert features is not None
    assert 0.5 < expected / sum(saved.values()) < 2.0, (expected, sum(saved.values()))


def test_the_plan_refuses_a_decoder_without_a_model_of_its_memory() -> None:
    with pytest.raises(UserError, match="decoder of type qwen3_5_text, whose memory is not modelled; known are gemma3"):
        find_shape("tiny:qwen3_5", shapes=None, made={})


@pytest.mark.parametrize("kind", ["qwen2_vl", "gemma3", "idefics3", "pixtral"])
def test_the_plan_counts_the_operations_of_the_tower(kind: str, tmp_path: Path) -> None:
    """Compare with the products that PyTorch counts."""
    shape, model = find_shape(f"tiny:{kind}", shapes=None, made={}), load_model(tmp_path, kind)
    processing = ImageProcessing.of_model(str(tmp_path / kind))
    assert processing is not None
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model.get_image_features(**processing.model_inputs([drawn(size=(64, 64))]))
    embedded = sum(token == processing.image_token_id for token in processing.expansion(64, 64))
    assert (
        0.95 < tower_operations(shape, embedded) / counted.get_total_flops() < 2.0
    )  # the projector is counted for each patch


def planned(folder: Path, *keys: str) -> tuple[Config, Lengths, dict[str, Stage]]:
    config = next(iter(load(ROOT / "configs" / "vision_quickstart.yaml", [f"run.dir={folder}", *keys]).runs.values()))
    lengths = response_lengths(config, None, Sizes())
    return config, lengths, {stage.name: stage for stage in training_stages(config, Sizes(), None, lengths)}


def test_the_plan_measures_the_tokens_of_images_and_the_time_of_the_tower(tmp_path: Path) -> None:
    # The processor enlarges the images to 64 x 64 pixels: 16 patches, of which four make a token.
    config, lengths, stages = planned(tmp_path)
    assert lengths.image_tokens == 4.0
    texts = mean_tokens_here(config)
    assert texts is not None
    assert lengths.mean == texts + 4.0
    shape = find_shape("tiny:qwen3_vl", shapes=None, made={})
    tower = 3 * 32 * tower_operations(shape, 4.0)  # forward and backward pass of 32 rows
    _, _, frozen = planned(tmp_path, "stages.sft.policy.vision_lr=null")
    speed = (
        tower * 2 / 3 / (stages["update"].seconds - frozen["update"].seconds)
    )  # the frozen tower has no backward pass
    assert speed == pytest.approx(rates(config, None, role="policy").peak)
    assert f"{tower / 1e12:,.4g} TFLOP of the images" in stages["update"].how


def test_rows_with_addresses_are_planned_without_fetching(tmp_path: Path) -> None:
    row = {"prompt": "What?", "image": "https://images.example.org/1.png", "completion": "a cat"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    _, lengths, _ = planned(tmp_path, f"stages.sft.data.train={tmp_path}/rows.jsonl")
    assert lengths.image_tokens is None


def test_images_that_cannot_be_read_here_count_as_the_whole_prompt() -> None:
    recipe = ROOT / "configs" / "grpo_qwen2_5_vl_2gpu.yaml"
    config = next(iter(load(recipe, []).runs.values()))
    lengths, shape = response_lengths(config, None, Sizes()), find_shape(config.policy.model, shapes=None, made={})
    assert lengths.image_tokens is None
    nodes = parse_cluster("1*cpu=96,gpu=2,type=h100")
    system, known = (
        system_of(config, Sizes(), nodes, replace(lengths, image_tokens=images)) for images in (None, 100.0)
    )
    most = tower_operations(shape, config.data.max_prompt_tokens)
    assert system.images_s / known.images_s == pytest.approx(most / tower_operations(shape, 100.0))
    assert system.base_s == known.base_s


def test_a_frozen_tower_is_not_part_of_a_sync() -> None:
    config = next(iter(load(ROOT / "configs" / "grpo_qwen2_5_vl_2gpu.yaml", []).runs.values()))
    shape = find_shape(config.policy.model, shapes=None, made={})
    assert sent_parameters(config, shape) == shape.parameters - 668_684_288
    trained = config.model_copy(update={"policy": config.policy.model_copy(update={"vision_lr": 1e-5})})
    assert sent_parameters(trained, shape) == shape.parameters

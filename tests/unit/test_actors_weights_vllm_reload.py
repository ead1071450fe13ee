"""An engine's weights are synced, on models without vLLM's layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

pytest.importorskip("vllm")

from actors.weights.files import FILES, files_checksum, mapped_files
from actors.weights.manifest import WeightManifest
from actors.weights.vllm_receivers import FilesEngine
from actors.weights.vllm_reload import ReloadEngine
from rlhf.errors import RunError


class TwoNames(nn.Module):
    """A router's gate has a second name in the experts. Weights are loaded by the second name."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.gate = self.gate = nn.Linear(2, 2, bias=False)
        self.norm = nn.Linear(2, 2, bias=False)

    def load_weights(self, weights: Any) -> set[str]:
        return {name for name, _ in weights}


def engine_of(model: nn.Module) -> Any:
    engine: Any = ReloadEngine.__new__(ReloadEngine)
    engine.packs, engine.model = False, model
    engine.wanted = {name for name, _ in model.named_parameters()}
    return engine


def test_a_layer_of_two_names_is_loaded_by_one_of_them() -> None:
    engine = engine_of(TwoNames())
    assert engine.wanted == {"experts.gate.weight", "norm.weight"}
    engine.load(iter({"gate.weight": None, "norm.weight": None}.items()))
    with pytest.raises(RunError, match=r"the engine's norm\.weight"):
        engine.load(iter({"gate.weight": None}.items()))


class Plain(nn.Module):
    """A model with a head tied to the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
        self.head.weight = self.first.weight

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> set[str]:
        parameters, names = dict(self.named_parameters()), set()
        for name, weight in weights:
            parameters[name].weight_loader(parameters[name], weight)  # type: ignore[operator]
            names.add(name)
        return names


def reloading(model: nn.Module, kind: type[ReloadEngine] = ReloadEngine) -> Any:
    from vllm.model_executor.model_loader.reload import record_metadata_for_reloading

    record_metadata_for_reloading(model)
    engine: Any = kind.__new__(kind)
    engine.model, engine.device, engine.parallel_config = model, torch.device("cpu"), SimpleNamespace(world_size=1)
    engine.model_config = SimpleNamespace(dtype=torch.float32)
    return engine


class Seeing(Plain):
    """The same model with a tower, and with a parameter of the tower beside the tower."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Sequential(nn.Linear(2, 2))
        self.image_newline = nn.Parameter(torch.ones(2))


def test_a_tower_that_is_not_published_stays_as_loaded() -> None:
    model = Seeing()
    engine = reloading(model)
    before = {name: (parameter.data_ptr(), parameter.clone()) for name, parameter in model.named_parameters()}
    tower = {"visual.0.weight", "visual.0.bias", "image_newline"}
    text = {name: torch.zeros_like(weight) for name, (_, weight) in before.items() if name not in tower}
    engine.prepare(SimpleNamespace(names=tuple(text)))
    engine.load(iter(text.items()))
    engine.finish_weight_update()
    for name, parameter in model.named_parameters():
        place, weight = before[name]
        assert torch.equal(parameter, weight if name in tower else text[name]), name
        assert parameter.data_ptr() == place
    engine.prepare(SimpleNamespace(names=tuple(text)))
    with pytest.raises(RunError, match=r"no weights were published for the engine's second\.bias"):
        engine.load((name, weight) for name, weight in text.items() if name != "second.bias")
    published = [*text, "visual.0.weight", "visual.0.bias"]  # with a part of the tower all is wanted
    engine.prepare(SimpleNamespace(names=tuple(published)))
    with pytest.raises(RunError, match=r"no weights were published for the engine's image_newline"):
        engine.load((name, before[name][1]) for name in published)


def test_a_folder_replaces_all_weights_but_those_of_the_tower(tmp_path: Path) -> None:
    model = Seeing()
    engine = reloading(model, FilesEngine)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    saved = {name: torch.full_like(weight, 7.0) for name, weight in before.items()}
    save_file(saved, tmp_path / "model.safetensors")
    checksum = files_checksum(mapped_files(tmp_path))
    manifest = WeightManifest(version=1, checksum=checksum, transport=FILES, fields={"folder": str(tmp_path)})
    engine.prepare(manifest)
    engine.receive(manifest)
    engine.finish_weight_update()
    tower = {"visual.0.weight", "visual.0.bias", "image_newline"}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name] if name in tower else saved[name]), name


def test_an_update_after_a_failed_one_begins_the_layers_anew() -> None:
    model = Plain()
    engine = reloading(model)
    names = [name for name, _ in model.named_parameters()]
    weights = {
        name: torch.full_like(parameter, place) for place, (name, parameter) in enumerate(model.named_parameters())
    }
    engine.prepare(SimpleNamespace(names=names))
    with pytest.raises(RunError):
        engine.load((name, -weights[name]) for name in names[:3])  # the first layer, and a part of the second
    engine.prepare(SimpleNamespace(names=names))
    engine.load(iter(weights.items()))
    engine.finish_weight_update()
    loaded = dict(model.named_parameters())
    assert all(torch.equal(loaded[name], weights[name]) for name in names)

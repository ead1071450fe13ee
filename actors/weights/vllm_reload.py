"""Loads published weights into a running vLLM model: the common part of all receiving ends.

vLLM packs weights for its kernels after loading. Plain decoders on a CPU are packed again in one pass. For all other
models vLLM's `initialize_layerwise_reload` puts each layer back into the loadable form, and the layer is packed again
once all weights of the layer have arrived.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import _layerwise_process, get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_layer

from actors.vllm_patches.reload import (
    copied_layers,
    forget_expert_kernels,
    forget_parts,
    name_loaders,
    num_constants,
    repack_heads,
)
from actors.weights.manifest import WeightManifest
from actors.weights.staging import Meeting
from actors.weights.vllm_packed import load_packed, loads_packed
from rlhf.errors import RunError
from rlhf.vision.kinds import is_vision_weight


@dataclass
class MeetingInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """The meeting point of a broadcast's receivers and the sender. Only broadcasts have a meeting."""

    meeting: Meeting | None
    first_rank: int  # at the meeting, of this engine's first worker


@dataclass
class ManifestInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """The published weights."""

    manifest: WeightManifest


class WithoutTower:
    """The modules of a model outside a vision tower and projector, in place of the model for vLLM's reload."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def modules(self) -> Iterator[torch.nn.Module]:
        """Yield the modules. A parameter of a tower may be outside of the tower's module, such as LLaVA's
        `image_newline`.
        """
        for name, module in self._model.named_modules():
            names = [own for own, _ in module.named_parameters(name, recurse=False)] or [name]
            if not all(map(is_vision_weight, names)):
                yield module


class ReloadEngine(WeightTransferEngine[MeetingInfo, ManifestInfo]):  # type: ignore[misc]
    """A receiving end for whole, named weights. The worker runs no step between start and finish."""

    init_info_cls = MeetingInfo
    update_info_cls = ManifestInfo
    checksum = ""  # of the bytes last received
    keeps_tower = False  # in this update

    def init_transfer_engine(self, init_info: MeetingInfo) -> None:
        """Connect to the sender, if needed by the transport."""

    def shutdown(self) -> None:
        """Free everything still open between updates."""

    def receive(self, manifest: WeightManifest) -> None:
        """Receive the published weights, pass the weights to `load`, and set `checksum`."""
        raise NotImplementedError

    def receive_weights(self, update_info: ManifestInfo) -> None:
        self.receive(update_info.manifest)

    def start_weight_update(self) -> None:
        """Wait for the manifest, which says what is loaded."""

    def prepare(self, manifest: WeightManifest) -> None:
        """Put the model into loadable form, without the vision tower if its weights are not published.

        The tower is then the one that the engine has loaded from the model's folder.
        """
        self.keeps_tower = not any(map(is_vision_weight, manifest.names))
        self.part = WithoutTower(self.model) if self.keeps_tower else self.model
        self.packs = loads_packed(self.model, device=self.device, num_workers=self.parallel_config.world_size)
        if not self.packs:
            if self.device.type == "cpu":
                forget_expert_kernels(self.model)
            name_loaders(self.model)
            has_failed = forget_parts(self.model)
            untied = {name for name, _ in self.model.named_parameters()}  # the reload takes tied parameters apart
            initialize_layerwise_reload(self.part)
            loaded = {name for name, _ in self.model.named_parameters()}  # no longer those derived from others
            if not has_failed:
                self.wanted = untied & loaded
            for layer in copied_layers(self.model):
                materialize_layer(layer, get_layerwise_info(layer))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive and load. The base class would wait for an accelerator, and a CPU has none."""
        info = self.parse_update_info(update_info)
        self.prepare(info.manifest)
        self.receive_weights(info)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def load(self, named_weights: Iterator[tuple[str, Tensor]]) -> None:
        """Give all weights to the model. The model fuses q, k, v and gate, up. RunError for missing weights."""
        if self.packs:
            load_packed(self.model, dict(named_weights))
            return
        loaded = self.model.load_weights(named_weights)
        if loaded is not None:
            places = {name: id(place) for name, place in self.model.named_parameters(remove_duplicate=False)}
            found = {places.get(name) for name in loaded}  # a layer may have two names, and is loaded by one
            published = [name for name in self.wanted if not (self.keeps_tower and is_vision_weight(name))]
            missing = [name for name in published if places[name] not in found]
            if missing:
                raise RunError(f"weight sync: no weights were published for the engine's {min(missing)}")
        for name, module in self.model.named_modules():
            info = get_layerwise_info(module)
            padded = isinstance(module, VocabParallelEmbedding)
            wanted = info.load_numel_total - num_constants(module) if info.can_load() else 0
            if 0 < info.load_numel < wanted and not padded:
                raise RunError(f"weight sync: only a part of the engine's {name} was published")

    def finish_weight_update(self) -> None:
        """Pack the model again, the head included."""
        if not self.packs:
            for layer in copied_layers(self.model):
                _layerwise_process(layer, get_layerwise_info(layer))
            finalize_layerwise_reload(self.part, self.model_config)
        repack_heads(self.model)

"""Processes on a GPU for the tests of this folder: a rank of the engine, and a policy's end of a weight sync."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from actors.rollout.engine_actor import RolloutSpec
from actors.weights import SENDERS, Meeting, Transport, WeightManifest, WeightSender
from rlhf.models.files.tiny import VOCAB_SIZE, byte_tokenizer
from tests.integration.engine_helpers import call, logprobs_of, model_like, spec
from tests.integration.rank_gang import Gang

GPU = torch.device("cuda", 0)
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
THREE_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 3, reason="needs three GPUs")


def build_model(folder: Path, *, tied: bool) -> Path:
    """Return a small Llama with heads of 64. vLLM has float32 attention for this size, but not for the quickstart's."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=tied,
        )
    )
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def _alone(rank: int, world_size: int, *, function: Callable[..., Any], options: dict[str, Any]) -> Any:
    return function(**options)


def on_one_rank(function: Callable[..., Any], **options: Any) -> Any:
    """Run function(**options) in a separate process, as a gang of one on the GPU. The function returns no GPU
    tensors.
    """
    gang = Gang(1, GPU)
    try:
        return gang.run(_alone, function=function, options=options)[0]
    finally:
        gang.close()


class Trainer:
    """The policy's end of a weight sync: a model in host memory for the probe, a copy on the GPU, and a sender."""

    sender: WeightSender

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def open(self, transport: Transport, meeting: Meeting | None) -> None:
        self.sender = SENDERS[transport](rank=0, meeting=meeting)

    def publish(self, version: int) -> WeightManifest | None:
        self.model = model_like(self.folder, seed=version)
        return self.sender.publish(self._weights(), version)

    def send(self, manifest: WeightManifest) -> None:
        self.sender.send(manifest, self._weights())

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, weight.to(GPU)) for name, weight in self.model.named_parameters())

    def settle(self) -> int:
        """Return the bytes still allocated on the GPU at the end."""
        self.sender.settle()
        return torch.cuda.memory_allocated()

    def probe(self, token_ids: list[int]) -> list[float]:
        logprobs: list[float] = logprobs_of(self.model, torch.tensor(token_ids))[1:].tolist()
        return logprobs


@contextmanager
def trainer(folder: Path, *, num_gpus: float) -> Iterator[Any]:
    """Return the actor's handle."""
    ray.cloudpickle.register_pickle_by_value(__import__(__name__, fromlist=["Trainer"]))
    ray.cloudpickle.register_pickle_by_value(__import__("tests.integration.engine_helpers", fromlist=["spec"]))
    handle = ray.remote(Trainer).options(num_cpus=1, num_gpus=num_gpus).remote(folder)
    yield handle
    ray.kill(handle)


def gpu_spec(model: Path, **changes: Any) -> RolloutSpec:
    """A small float32 engine on a third of a GPU."""
    values = {"device": "cuda", "kv_cache_gib": None, "gpu_memory_utilization": 0.3, "call_timeout_s": 120.0}
    return spec(model, **(values | changes))


def sync(engine: Any, policy: Any, version: int) -> int:
    """Sync as the controller does. Return the bytes of the policy's process on its GPU afterwards."""
    manifest = call(policy.publish.remote(version))
    updated = engine.update_weights.remote(manifest, version)
    receipt, _ = call(updated, policy.send.remote(manifest))
    assert (receipt.version, receipt.checksum) == (version, manifest.checksum)
    held: int = call(policy.settle.remote())
    return held

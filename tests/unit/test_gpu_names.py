"""Names of vLLM, torch and DeepSpeed that only GPUs use exist in the installed versions, with the same arguments.

Nothing is called. A version that drops or renames a name fails here, on a CPU, before the first run on a GPU.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine as Engine
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from torch import distributed
from torch.multiprocessing import reductions
from torch.nn.attention.varlen import varlen_attn

from tests.fixtures.sources import ROOT, keywords

STUBS = Path(torch.__file__).parent / "_C"  # names of CUDA builds too


def sources() -> Iterator[tuple[Path, str]]:
    for package in ("rlhf", "actors"):
        for path in (ROOT / package).rglob("*.py"):
            yield path, path.read_text(encoding="utf-8")


def test_names_of_torch() -> None:
    pattern = re.compile(r"(?<![\w.])(?:torch\.cuda|dist)(?:\.\w+)+")
    names = {match for _, text in sources() for match in pattern.findall(text)}
    stub = (STUBS / "_distributed_c10d.pyi").read_text()
    for name in names:
        owner: Any = torch.cuda if name.startswith("torch.cuda") else distributed
        parts = name.removeprefix("torch.cuda.").removeprefix("dist.").split(".")
        if parts[0] == "ProcessGroupNCCL":  # a CPU build lacks this class
            body = stub.partition("class ProcessGroupNCCL(Backend):")[2].partition("\nclass ")[0]
            assert body
            assert all(f"class {part}" in body for part in parts[1:]), name
            continue
        for part in parts:
            assert hasattr(owner, part), name
            owner = getattr(owner, part)
    assert {name for name in names if name.startswith("dist.ProcessGroupNCCL")}
    private = {match for _, text in sources() for match in re.findall(r"torch\._C\.(_cuda\w+)", text)}
    assert private
    assert all(f"def {name}(" in (STUBS / "__init__.pyi").read_text() for name in private)


@pytest.mark.parametrize(
    ("function", "arguments", "options"),
    [
        (varlen_attn, 7, {"scale": 1.0, "window_size": (-1, 0), "enable_gqa": True}),
        (reductions.reduce_tensor, 1, {}),
        (Engine.offload_states, 1, {"include": []}),
        (Engine.offload_states, 1, {}),
        (Engine.reload_states, 1, {}),
    ],
)
def test_signatures(function: Callable[..., Any], arguments: int, options: dict[str, Any]) -> None:
    inspect.signature(function).bind(*[None] * arguments, **options)


def test_states_that_deepspeed_moves() -> None:
    text = (ROOT / "rlhf/engine/deepspeed.py").read_text()
    used = set(re.findall(r"\bState\.(\w+)", text))
    assert used <= set(OffloadStateTypeEnum.__members__)
    assert used


def test_the_argument_of_a_cuda_handle_that_is_the_device() -> None:
    from actors.weights.vllm_receivers import _DEVICE_ARGUMENT

    assert list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)[_DEVICE_ARGUMENT] == "storage_device"


def test_vllm_engine_arguments() -> None:
    from vllm import EngineArgs

    used = keywords("actors/rollout/vllm_engine.py", "EngineArgs")
    assert {"enable_sleep_mode", "gpu_memory_utilization", "worker_extension_cls"} <= used
    assert used <= {field.name for field in dataclasses.fields(EngineArgs)}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sleep", {"level": 2}),
        ("wake_up", {"tags": ["weights"]}),
        ("collective_rpc", {"method": "", "kwargs": {}}),
        ("reset_prefix_cache", {"reset_running_requests": True}),
        ("add_lora", {"lora_request": None}),
        ("set_weight_version", {"weight_version": "1"}),
        ("get_weight_version", {}),
        ("abort_request", {"request_ids": []}),
        ("add_request", {"request_id": "", "prompt": {}, "params": None, "lora_request": None}),
        ("step", {}),
    ],
)
def test_vllm_engine_methods(name: str, options: dict[str, Any]) -> None:
    from vllm.v1.engine.llm_engine import LLMEngine

    inspect.signature(getattr(LLMEngine, name)).bind(None, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("init_weight_transfer_engine", {"init_info": {}}),
        ("start_weight_update", {}),
        ("update_weights", {"update_info": {}}),
        ("finish_weight_update", {}),
        ("sleep", {"level": 1}),
        ("wake_up", {"tags": ["kv_cache"]}),
    ],
)
def test_methods_of_vllm_workers_on_gpus(name: str, options: dict[str, Any]) -> None:
    from vllm.v1.worker.gpu_worker import Worker

    inspect.signature(getattr(Worker, name)).bind(None, **options)


def test_our_extension_of_vllm_workers_hides_none_of_their_methods() -> None:
    from vllm.v1.worker.gpu_worker import Worker

    # Importing the module would patch vLLM for all later tests of this process.
    tree = ast.parse((ROOT / "actors/weights/vllm_extension.py").read_text(encoding="utf-8"))
    (extension,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    ours = {node.name for node in extension.body if isinstance(node, ast.FunctionDef)}
    told = {"received_checksum", "gpu_peak_gib", "record_experts", "experts_of", "unread_weights"}
    assert ours == told | {"start_profile", "stop_profile"}
    assert not [name for name in ours if hasattr(Worker, name)]


def test_tags_by_which_vllm_sleeps() -> None:
    from vllm.v1.executor.abstract import SLEEP_TAGS

    assert {"weights", "kv_cache"} == SLEEP_TAGS


def test_nccl_settings_that_vllm_can_leave_out() -> None:
    from vllm.utils.nccl import unpinned_nccl_env

    inspect.signature(unpinned_nccl_env).bind()

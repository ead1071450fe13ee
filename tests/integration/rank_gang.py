"""Gangs for tests of the engine: a process for each rank, spawned once for many tasks.

Tests share the gangs of `Gangs`. Each task begins with the same random state, independent of earlier tasks. A gang with
a failed rank is replaced.
"""

from __future__ import annotations

import gc
import multiprocessing
import random
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from rlhf.engine.deepspeed import DeepSpeedEngine
from rlhf.engine.distributed import RankContext, init_distributed, leave_distributed
from rlhf.engine.training_engine import ScheduleSettings

DEADLINE_S = 240.0  # limit of each wait: the first includes imports, on a busy machine
CPU = torch.device("cpu")


def small_config(**changes: Any) -> LlamaConfig:
    """Return a Llama with two layers, four heads and two key-value heads."""
    values: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "num_labels": 1,
        "pad_token_id": None,
    }
    return LlamaConfig(**(values | changes))


def place_of(rank: int, world_size: int, device: str = "cpu") -> RankContext:
    return RankContext(
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        device=device,
        threads=1,
        deadline_s=DEADLINE_S,
    )


def engine_of(model: Any, *, stage: int, dtype: torch.dtype = torch.float32, **options: Any) -> DeepSpeedEngine:
    """Return an engine of a rank. `options` are the engine's; without a schedule, the rate is constant."""
    options.setdefault("schedule", ScheduleSettings(kind="constant", warmup_steps=0, total_steps=10))
    shared: dict[str, Any] = {"zero_stage": stage, "dtype": dtype, "device": CPU, "deadline_s": DEADLINE_S}
    return DeepSpeedEngine(model, **shared, **options)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def serve(connection: Connection, rank: int, world_size: int, port: int, device: torch.device) -> None:
    torch.set_num_threads(1)
    init_distributed(place_of(rank, world_size, device.type), "127.0.0.1", port)
    gc.freeze()  # exempt imports: DeepSpeed collects garbage a dozen times for each bfloat16 optimizer
    while (task := connection.recv()) is not None:
        function, options = task
        _seed()
        try:
            connection.send((None, function(rank, world_size, **options)))
        except Exception:
            connection.send((traceback.format_exc(), None))
            raise
    leave_distributed()


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


class Gang:
    """Ranks for running functions together. The gang has failed as soon as a rank has failed."""

    def __init__(self, world_size: int, device: torch.device = CPU, *, deadline_s: float = DEADLINE_S) -> None:
        context = multiprocessing.get_context("spawn")
        port = free_port()
        self.deadline_s = deadline_s  # of a function
        pipes = [context.Pipe() for _ in range(world_size)]
        self.has_failed = False
        self.connections = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=serve, args=(theirs, rank, world_size, port, device), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def run(self, function: Callable[..., Any], /, **options: Any) -> list[Any]:
        """Return the result of function(rank, world_size, **options) in each rank."""
        self.has_failed = True  # until all ranks have answered
        for connection in self.connections:
            connection.send((function, options))
        results = []
        for rank, connection in enumerate(self.connections):
            limit_s = self.deadline_s
            assert connection.poll(limit_s), f"rank {rank} did not finish {function.__name__} in {limit_s:g} s"
            error, result = connection.recv()
            assert error is None, f"rank {rank}: {error}"
            results.append(result)
        self.has_failed = False
        return results

    def close(self) -> None:
        for connection, process in zip(self.connections, self.processes, strict=True):
            if self.has_failed:
                process.kill()
            elif process.is_alive():
                connection.send(None)
        for process in self.processes:
            process.join(DEADLINE_S)
            process.kill()


class Gangs:
    """Gangs by the number of ranks, started at the first use and again after a failure."""

    def __init__(self) -> None:
        self._gangs: dict[int, Gang] = {}

    def __getitem__(self, ranks: int) -> Gang:
        gang = self._gangs.get(ranks)
        if gang is not None and gang.has_failed:
            self._gangs.pop(ranks).close()
        if ranks not in self._gangs:
            self._gangs[ranks] = Gang(ranks)
        return self._gangs[ranks]

    def close(self) -> None:
        for gang in self._gangs.values():
            gang.close()

"""Ranks and engines of clients' adapters in this process, over a model of a few hundred weights.

The model scores a token by the token before: base[token] plus the adapter's share. Losses are plain loops in torch.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.adapters import (
    AdamStep,
    AdapterShape,
    LossReport,
    LossRows,
    NamedLoss,
    SampleAnswer,
    SampledSequence,
    SampleRequest,
)
from rlhf.errors import AdaptersLost, RunError, UserError, WorkerLost
from rlhf.roles import PolicyProbe
from rlhf.types import MemoryReport

VOCABULARY = 12
EOS = 0
MOST_RANK = 8
WEIGHTS = "adapter_model.safetensors"


def base_scores() -> Tensor:
    return torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(7))


@dataclass
class Adapter:
    """A client's model: scores + a @ b."""

    shape: AdapterShape
    a: Tensor = field(init=False)
    b: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.shape.seed)
        rank = self.shape.rank or VOCABULARY  # a whole model has the largest
        self.a = torch.randn(VOCABULARY, rank, generator=generator).requires_grad_()
        self.b = torch.zeros(rank, VOCABULARY).requires_grad_()
        self.optimizer = torch.optim.AdamW([self.a, self.b], lr=0.0)
        self.has_gradient = False
        self.dropped: str | None = None

    def drop(self, reason: str | None) -> None:
        self.optimizer.zero_grad()
        self.has_gradient, self.dropped = False, reason


def logprobs(adapter: tuple[Tensor, Tensor] | None) -> Tensor:
    scores = base_scores() if adapter is None else base_scores() + adapter[0] @ adapter[1]
    return torch.log_softmax(scores, -1)


def now_and_then(least: int, most: int) -> Callable[[], bool]:
    """Return a function that is True at random, after `least` to `most` calls with False."""
    rng = random.Random(least)
    left = rng.randrange(least)

    def is_now() -> bool:
        nonlocal left
        left -= 1
        if left >= 0:
            return False
        left = rng.randrange(least, most)
        return True

    return is_now


class MortalAdapters:
    """Ranks that may be lost, with all adapters."""

    def __init__(self) -> None:
        self.adapters: dict[str, Any] = {}
        self.dies: Callable[[], bool] = lambda: False  # asked before and after each call
        self.deaths: list[WorkerLost] = []
        self.forgiven: list[WorkerLost] = []
        self._lost: set[str] = set()

    def holds(self, adapter: str) -> bool:
        return adapter in self.adapters

    def forgive(self, losses: Sequence[WorkerLost]) -> None:
        self.forgiven += losses

    def die(self) -> None:
        """Lose the ranks with all adapters. New ranks work at once."""
        reason = f"update: policy rank 0 died ({len(self.deaths)})."
        self.deaths.append(WorkerLost(reason, role="policy", rank=0, stage="update", kind="died"))
        self._lost |= self.adapters.keys()
        self.adapters.clear()

    def refuse_lost(self, adapter: str) -> None:
        if adapter in self._lost:
            raise AdaptersLost(self.deaths[-1])


def on_ranks(method: Callable[..., Any]) -> Any:
    """Let a call fail that was lost with the ranks, or that comes for an adapter of lost ranks."""

    async def called(self: MortalAdapters, adapter: str, *args: Any, **options: Any) -> Any:
        if self.dies():
            self.die()
        if method.__name__ != "create":
            self.refuse_lost(adapter)
        life = len(self.deaths)
        result = await method(self, adapter, *args, **options)
        if self.dies():
            self.die()
        if len(self.deaths) > life:
            raise AdaptersLost(self.deaths[-1])
        return result

    return called


class FakeAdapters(MortalAdapters):
    """The policy of clients. `calls` has the calls in their order; `held` keeps forward_backward waiting."""

    adapters: dict[str, Adapter]

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str]] = []
        self.held: asyncio.Event | None = None
        self.broken: Exception | None = None  # raised once by the next forward_backward
        self.deadly: int | None = None  # rows with this token end the ranks
        self._turn = asyncio.Lock()

    async def memory(self) -> MemoryReport:
        raise NotImplementedError

    def _adapter(self, call: str, name: str) -> Adapter:
        self.calls.append((call, name))
        if name not in self.adapters:
            raise RunError(f"there is no adapter {name}")
        return self.adapters[name]

    @on_ranks
    async def create(self, adapter: str, shape: AdapterShape) -> None:
        self.calls.append(("create", adapter))
        if shape.rank > MOST_RANK:
            raise UserError(f"rank {shape.rank} is more than policy.lora.rank = {MOST_RANK}")
        if adapter in self.adapters:
            raise UserError(f"the name {adapter} is taken")
        self._lost.discard(adapter)
        self.adapters[adapter] = Adapter(shape)

    @on_ranks
    async def remove(self, adapter: str) -> None:
        self._adapter("remove", adapter)
        del self.adapters[adapter]

    @on_ranks
    async def forward_backward(
        self, adapter: str, rows: LossRows, loss: NamedLoss, *, forward_only: bool = False
    ) -> LossReport:
        own = self._adapter("forward" if forward_only else "forward_backward", adapter)
        if self.held is not None:
            await self.held.wait()
        async with self._turn:
            try:
                if self.deadly is not None and self.deadly in rows.token_ids:
                    self.die()
                if self.broken is not None:
                    error, self.broken = self.broken, None
                    raise error
                return _pass(own, rows, loss, forward_only=forward_only)
            except (UserError, RunError):
                if not forward_only:
                    own.drop("forward_backward failed")
                raise

    @on_ranks
    async def optim_step(self, adapter: str, step: AdamStep) -> float:
        own = self._adapter("optim_step", adapter)
        if own.dropped is not None:
            reason = own.dropped
            own.drop(None)
            raise UserError(reason)
        if not own.has_gradient:
            raise UserError("there is no gradient; call forward_backward first")
        group = own.optimizer.param_groups[0]
        group.update(lr=step.lr, betas=step.betas, eps=step.eps, weight_decay=step.weight_decay)
        largest = float("inf") if step.grad_clip is None else step.grad_clip
        norm = float(torch.nn.utils.clip_grad_norm_([own.a, own.b], largest))
        own.optimizer.step()
        own.drop(None)
        return norm

    @on_ranks
    async def drop_gradient(self, adapter: str, reason: str) -> None:
        self._adapter("drop_gradient", adapter).drop(reason)

    @on_ranks
    async def save(self, adapter: str, folder: Path) -> None:
        own = self._adapter("save", adapter)
        folder.mkdir()
        tensors = {"a": own.a.detach(), "b": own.b.detach()}
        for index, state in own.optimizer.state_dict()["state"].items():
            tensors |= {f"{index}.{name}": value.clone() for name, value in state.items()}
        save_file(tensors, folder / "state.safetensors")
        (folder / "shape.json").write_text(json.dumps(asdict(own.shape)))

    @on_ranks
    async def load(self, adapter: str, folder: Path, *, optimizer: bool) -> None:
        own = self._adapter("load", adapter)
        if AdapterShape(**json.loads((folder / "shape.json").read_text())) != own.shape:
            raise UserError("the saved adapter has another shape")
        tensors = load_file(folder / "state.safetensors")
        with torch.no_grad():
            own.a.copy_(tensors.pop("a"))
            own.b.copy_(tensors.pop("b"))
        own.optimizer = torch.optim.AdamW([own.a, own.b], lr=0.0)
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
        if optimizer and state:
            own.optimizer.load_state_dict(own.optimizer.state_dict() | {"state": state})
        own.drop(None)

    @on_ranks
    async def export(self, adapter: str, folder: Path) -> str:
        own = self._adapter("export", adapter)
        folder.mkdir()
        save_file({"a": own.a.detach(), "b": own.b.detach()}, folder / WEIGHTS)
        (folder / "adapter_config.json").write_text(json.dumps({"r": own.shape.rank}))
        return checksum(folder)

    @on_ranks
    async def probe(self, adapter: str | None, token_ids: Sequence[int]) -> list[float]:
        own = None if adapter is None else self.adapters[adapter]
        table = logprobs(None if own is None else (own.a.detach(), own.b.detach()))
        return [float(table[x, y]) for x, y in pairwise(token_ids)]


def checksum(folder: Path) -> str:
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def _pass(own: Adapter, rows: LossRows, loss: NamedLoss, *, forward_only: bool) -> LossReport:
    if int(rows.targets.max()) >= VOCABULARY or int(rows.token_ids.max()) >= VOCABULARY:
        raise UserError(f"a token is not below {VOCABULARY}")
    with torch.set_grad_enabled(not forward_only):
        scored = logprobs((own.a, own.b))[rows.token_ids].gather(-1, rows.targets)
        columns = dict(rows.columns)
        match loss.name:
            case "cross_entropy":
                value = -(scored * columns.get("weights", torch.ones_like(scored))).sum()
            case "importance_sampling":
                value = -(torch.exp(scored - columns["logprobs"]) * columns["advantages"]).sum()
            case _:
                raise UserError(f"the loss {loss.name} is not known here")
        if not forward_only:
            value.backward()
            own.has_gradient = True
    return LossReport(loss=float(value.detach()), logprobs=scored.detach(), metrics={"tokens": float(scored.numel())})


class FakeEngines:
    """The engines of clients. `held` keeps samples waiting."""

    def __init__(self) -> None:
        self.adapters: dict[str, tuple[Tensor, Tensor]] = {}
        self.held: asyncio.Event | None = None
        self.loads: list[str] = []
        self.seeds: list[int | None] = []

    async def memory(self) -> MemoryReport:
        raise NotImplementedError

    async def load(self, adapter: str, folder: Path, *, checksum: str, probe: PolicyProbe) -> float:
        self.loads.append(adapter)
        if hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest() != checksum:
            raise RunError("an engine read another file")
        tensors = load_file(folder / WEIGHTS)
        table = logprobs((tensors["a"], tensors["b"]))
        pairs = pairwise(probe.token_ids)
        differences = [abs(float(table[x, y]) - p) for (x, y), p in zip(pairs, probe.logprobs, strict=True)]
        if max(differences) > 1e-5:
            raise RunError("an engine gives other log-probabilities than the policy")
        self.adapters[adapter] = tensors["a"], tensors["b"]
        return max(differences)

    async def unload(self, adapter: str) -> None:
        del self.adapters[adapter]

    async def sample(self, adapter: str | None, request: SampleRequest) -> SampleAnswer:
        if self.held is not None:
            await self.held.wait()
        self.seeds.append(request.seed)
        table = logprobs(None if adapter is None else self.adapters[adapter])
        ids = request.token_ids
        prompt = (None, *(float(table[x, y]) for x, y in pairwise(ids)))
        top = None
        if request.top_prompt_logprobs:
            top = (None, *(_top(table[x], request.top_prompt_logprobs) for x in ids[:-1]))
        return SampleAnswer(
            sequences=tuple(_draw(table, request, sample) for sample in range(request.num_samples)),
            prompt_logprobs=prompt if request.prompt_logprobs else None,
            top_prompt=top,
        )


def _top(row: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    best = row.topk(count)
    return tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def _draw(table: Tensor, request: SampleRequest, sample: int) -> SampledSequence:
    generator = torch.Generator().manual_seed((request.seed or 0) + sample)
    last, ids, numbers, top = request.token_ids[-1], [], [], []
    reason: Any = "length"
    for _ in range(request.max_tokens or 16):
        row = table[last]
        drawn = torch.multinomial(row.exp(), 1, generator=generator) if request.temperature else row.argmax()[None]
        last = int(drawn)
        ids.append(last)
        numbers.append(float(row[last]))
        top.append(_top(row, request.top_logprobs))
        if last in request.stop_token_ids or (request.ends_at_eos and last == EOS):
            reason = "stop"
            break
    return SampledSequence(
        token_ids=tuple(ids),
        logprobs=tuple(numbers),
        finish_reason=reason,
        top=tuple(top) if request.top_logprobs else None,
    )

"""Tenants that send random requests to a Tinker server over HTTP, together or alone, for comparisons bit for bit.

The tenants write HTTP themselves: each sends several requests before it reads a result. A tenant's requests and their
order depend on the seed of the tenant alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from tinker import types
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import deserialize_sample_response

from actors.weights.adapter import WEIGHTS, file_checksum
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
from rlhf.engine.distributed import init_distributed, leave_distributed
from rlhf.errors import RunError
from rlhf.roles import PolicyProbe
from rlhf.types import MemoryReport
from rlhf.workers.adapters.adapter_worker import AdapterWorker, merged_report
from tests.fakes.adapters import MortalAdapters, on_ranks
from tests.integration.adapter_tenants import LOSSES, worker_of
from tests.integration.rank_gang import free_port, place_of

API = "/api/v1"
AWAY_S = 400.0  # limit of a request, over a restart of the server
ON_THE_WAY = 6  # requests of a tenant without a result
TOKENS = 250  # ids of the rows
KINDS = {
    "train": 40,
    "forward": 8,
    "step": 22,
    "bad": 4,
    "bad step": 3,
    "save": 5,
    "load": 4,
    "sampler": 5,
    "sample": 9,
}


@dataclass(frozen=True)
class Answer:
    """The result of a request, without the session's id."""

    kind: str
    status: int
    content: bytes

    def difference(self, other: Answer) -> float:
        """Compare bit for bit, but log-probabilities of samples by value: an engine's rounding depends on the batch.

        Return 0.0 for equal answers, the largest difference of a log-probability between samples of equal tokens, and
        infinity for other answers.
        """
        if self == other:
            return 0.0
        if self.kind != "sample" or other.status != self.status:
            return math.inf
        one, two = deserialize_sample_response(self.content), deserialize_sample_response(other.content)
        if [sample.tokens for sample in one.sequences] != [sample.tokens for sample in two.sequences]:
            return math.inf
        pairs: list[tuple[Any, Any]] = [(one.prompt_logprobs, two.prompt_logprobs)]
        pairs += [(a.logprobs, b.logprobs) for a, b in zip(one.sequences, two.sequences, strict=True)]
        numbers = [np.array([values[values[0] is None :] for values in pair]) for pair in pairs]
        return max(float(np.abs(ours - theirs).max(initial=0.0)) for ours, theirs in numbers)


@dataclass
class Tenant:
    """A client with a session and a model. `results` has the answers in order, without the session's id."""

    seed: int
    http: aiohttp.ClientSession
    model: str
    seen: Callable[[], object] = lambda: None  # called after each result
    results: list[Answer] = field(default_factory=list)

    async def post(self, path: str, body: Any) -> tuple[int, bytes]:
        """Send a request, again while the server is away. A server knows a repeated request by its number."""
        options: dict[str, Any] = {"data": body} if isinstance(body, bytes) else {"json": body}
        headers = {"x-api-key": f"tml-{self.seed}"}
        async with asyncio.timeout(AWAY_S):
            while True:
                try:
                    async with self.http.post(f"{API}/{path}", headers=headers, **options) as answer:
                        return answer.status, await answer.read()
                except aiohttp.ClientConnectionError:
                    await asyncio.sleep(0.2)

    async def known(self, path: str, body: Any) -> dict[str, Any]:
        status, content = await self.post(path, body)
        assert status == 200, content
        values: dict[str, Any] = json.loads(content)
        return values

    async def result(self, kind: str, request_id: str) -> None:
        """Keep the result of a request."""
        status, content = 408, b""
        while status == 408:
            status, content = await self.post("retrieve_future", {"request_id": request_id})
        self.results.append(Answer(kind, status, content.replace(self.session_id.encode(), b"SESSION_")))
        self.seen()

    async def run(self, count: int) -> list[Answer]:
        """Send a number of requests, and return the results."""
        self.session_id = (await self.known("create_session", {}))["session_id"]
        lora = {"rank": 1 + self.seed % 8, "seed": self.seed, "train_mlp": self.seed % 3 != 0}
        begin = {"session_id": self.session_id, "model_seq_id": 0, "base_model": self.model, "lora_config": lora}
        answer = await self.known("create_model", begin)
        self.model_id = answer["model_id"]
        await self.result("create", answer["request_id"])
        draw, waits = random.Random(self.seed), random.Random()
        on_the_way = deque[tuple[str, str]]()
        self.seq_id, self.saved, samplers, sampled = 0, 0, list[str](), 0
        for number in range(count):
            kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
            match kind:
                case "sampler":
                    request = await self.send("save_weights_for_sampler", sampling_session_seq_id=len(samplers))
                    samplers.append(f"{self.session_id}:sample:{len(samplers)}")
                    while on_the_way:
                        await self.result(*on_the_way.popleft())
                    await self.result(kind, request)
                    continue
                case "sample":
                    request = await self.sample(samplers, sampled, draw)
                    sampled += 1
                case _:
                    request = await self.request(kind, number, draw)
            on_the_way.append((kind, request))
            if waits.random() < 0.3:
                await asyncio.sleep(waits.random() * 0.01)
            while len(on_the_way) > ON_THE_WAY:
                await self.result(*on_the_way.popleft())
        while on_the_way:
            await self.result(*on_the_way.popleft())
        await self.post(f"sessions/{self.session_id}/finish", {})
        return self.results

    async def send(self, call: str, **fields: Any) -> str:
        self.seq_id += 1
        answer = await self.known(call, {"model_id": self.model_id, "seq_id": self.seq_id, **fields})
        return str(answer["request_id"])

    async def sample(self, samplers: Sequence[str], number: int, draw: random.Random) -> str:
        """Ask for samples by the newest sampler, or by the base model."""
        if samplers:
            sampler = samplers[-1]
        else:
            sampler = f"{self.session_id}:sample:{10**6}"
            base = {"session_id": self.session_id, "sampling_session_seq_id": 10**6, "base_model": self.model}
            await self.known("create_sampling_session", base)
        tokens = [draw.randrange(TOKENS) for _ in range(draw.randint(1, 12))]
        asked = {
            "sampling_session_id": sampler,
            "seq_id": number,
            "prompt": {"chunks": [{"tokens": tokens}]},
            "sampling_params": {"max_tokens": 8, "stop": [], "seed": number, "temperature": 1.0},
            "num_samples": draw.randint(1, 3),
            "prompt_logprobs": True,
        }
        return str((await self.known("asample", asked))["request_id"])

    async def request(self, kind: str, number: int, draw: random.Random) -> str:
        match kind:
            case "train" | "forward" | "bad":
                self.seq_id += 1
                answer = await self.known("forward_backward", self.rows(kind, number, draw))
                return str(answer["request_id"])
            case "step" | "bad step":
                adam = {
                    "learning_rate": draw.choice([0.0, 1e-3, 1e-2]),
                    "beta1": draw.choice([0.0, 0.9]),
                    "weight_decay": draw.choice([0.0, 0.1]),
                    "grad_clip_norm": draw.choice([0.0, 1.0]),
                }
                return await self.send("optim_step", adam_params=adam | ({"eps": 0.0} if kind == "bad step" else {}))
            case "save":
                self.saved += 1
                return await self.send("save_weights", path=f"s{self.saved % 3}", overwrite=True)
            case _:  # load; some of the paths are missing
                path = f"tinker://{self.model_id}/weights/s{draw.randrange(3)}"
                return await self.send("load_weights", path=path, optimizer=draw.random() < 0.7)

    def rows(self, kind: str, number: int, draw: random.Random) -> bytes:
        """Return a request with 1 to 4 random rows of a random loss. bad: a weight is not a number."""
        loss, rng = LOSSES[number % len(LOSSES)], np.random.default_rng([self.seed, number])
        data = []
        for _ in range(draw.randint(1, 4)):
            length = draw.randint(1, 24)
            inputs: dict[str, Any] = {"target_tokens": rng.integers(0, TOKENS, length)}
            inputs["weights"] = rng.random(length, dtype=np.float32)
            if loss != "cross_entropy":
                inputs["advantages"] = rng.random(length, dtype=np.float32) - 0.5
                inputs["logprobs"] = -rng.random(length, dtype=np.float32) - 5.0
            if loss == "gspo":
                inputs["sequence_ratio_mask"] = np.ones(length, dtype=np.float32)
            if kind == "bad":
                inputs["weights"][0] = np.nan
            prompt = types.ModelInput.from_ints(rng.integers(0, TOKENS, length).tolist())
            data.append(types.Datum(model_input=prompt, loss_fn_inputs=inputs))
        given = types.ForwardBackwardInput(data=data, loss_fn=loss)  # type: ignore[arg-type]
        asked = types.ForwardBackwardRequest(forward_backward_input=given, model_id=self.model_id, seq_id=self.seq_id)
        message = forward_backward_request_to_proto(asked)
        message.forward_only = kind == "forward"
        return bytes(message.SerializeToString())


async def run_tenants(
    url: str, model: str, seeds: Sequence[int], count: int, *, together: bool, seen: Callable[[], object] = lambda: None
) -> list[list[Answer]]:
    """Let each tenant send `count` requests, all at once or one tenant after the other. Return their results."""
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=None)) as http:
        tenants = [Tenant(seed, http, model, seen) for seed in seeds]
        if together:
            return list(await asyncio.gather(*(tenant.run(count) for tenant in tenants)))
        return [await tenant.run(count) for tenant in tenants]


def differing(
    one: list[list[Answer]], two: list[list[Answer]], *, tolerance: float = 1e-4
) -> list[tuple[Answer, Answer]]:
    """Return pairs of answers that differ: in a bit, or by more than `tolerance` in log-probabilities of samples."""
    pairs = [pair for ours, theirs in zip(one, two, strict=True) for pair in zip(ours, theirs, strict=True)]
    return [pair for pair in pairs if not pair[0].difference(pair[1]) <= tolerance]


def kinds(results: list[list[Answer]]) -> Counter[tuple[str, bool]]:
    """Count the answers by the kind of request, and by whether the request succeeded."""
    return Counter((answer.kind, b'"category"' not in answer.content) for answers in results for answer in answers)


class WorkerAdapters(MortalAdapters):
    """A rank with a real model and DeepSpeed, in a thread of this process."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self._thread = ThreadPoolExecutor(1)
        self._thread.submit(init_distributed, place_of(0, 1), "127.0.0.1", free_port()).result()
        self.worker: AdapterWorker = self._thread.submit(worker_of, model, 0, 1).result()

    def close(self) -> None:
        self._thread.submit(leave_distributed).result()
        self._thread.shutdown()

    async def _call(self, call: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def memory(self) -> MemoryReport:
        raise NotImplementedError

    @on_ranks
    async def create(self, adapter: str, shape: AdapterShape) -> None:
        def made() -> None:
            if adapter in self.worker.adapters:  # of lost ranks
                self.worker.remove(adapter)
            self.worker.create(adapter, shape)

        await self._call(made)
        self._lost.discard(adapter)
        self.adapters[adapter] = shape

    @on_ranks
    async def remove(self, adapter: str) -> None:
        self.adapters.pop(adapter, None)
        await self._call(lambda: self.worker.remove(adapter))

    @on_ranks
    async def forward_backward(
        self, adapter: str, rows: LossRows, loss: NamedLoss, *, forward_only: bool = False
    ) -> LossReport:
        report = await self._call(lambda: self.worker.forward_backward(adapter, rows, loss, forward_only=forward_only))
        return merged_report([report])

    @on_ranks
    async def optim_step(self, adapter: str, step: AdamStep) -> float:
        return float(await self._call(lambda: self.worker.step_adapter(adapter, step)))

    @on_ranks
    async def drop_gradient(self, adapter: str, reason: str) -> None:
        await self._call(lambda: self.worker.drop_gradient(adapter, reason))

    @on_ranks
    async def save(self, adapter: str, folder: Path) -> None:
        await self._call(lambda: self.worker.save_adapter(adapter, folder))

    @on_ranks
    async def load(self, adapter: str, folder: Path, *, optimizer: bool) -> None:
        await self._call(lambda: self.worker.load_adapter(adapter, folder, optimizer=optimizer))

    @on_ranks
    async def export(self, adapter: str, folder: Path) -> str:
        await self._call(lambda: self.worker.export_adapter(adapter, folder))
        return file_checksum(folder / WEIGHTS)

    @on_ranks
    async def probe(self, adapter: str | None, token_ids: Sequence[int]) -> list[float]:
        return list(await self._call(lambda: self.worker.probe_adapter(adapter, token_ids)))


class EchoEngines:
    """Engines whose samples depend on the bytes of the adapter's file and on the request."""

    def __init__(self) -> None:
        self.adapters: dict[str, str] = {}

    async def memory(self) -> MemoryReport:
        raise NotImplementedError

    async def load(self, adapter: str, folder: Path, *, checksum: str, probe: PolicyProbe) -> float:
        if file_checksum(folder / WEIGHTS) != checksum:
            raise RunError("an engine read another file")
        self.adapters[adapter] = f"{checksum} {probe.logprobs}"
        return 0.0

    async def unload(self, adapter: str) -> None:
        del self.adapters[adapter]

    async def sample(self, adapter: str | None, request: SampleRequest) -> SampleAnswer:
        await asyncio.sleep(0.001)
        weights = None if adapter is None else self.adapters[adapter]
        numbers = hashlib.sha256(repr((weights, request)).encode()).digest()
        token_ids = tuple(numbers[: request.max_tokens or 1])
        sequence = SampledSequence(
            token_ids=token_ids, logprobs=tuple(-float(token) for token in token_ids), finish_reason="length"
        )
        prompt = (None, *(float(a - b) for a, b in pairwise(request.token_ids)))
        return SampleAnswer(
            sequences=tuple(replace(sequence) for _ in range(request.num_samples)),
            prompt_logprobs=prompt if request.prompt_logprobs else None,
        )

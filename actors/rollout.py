"""The rollout worker: one vLLM engine that answers groups of requests with the policy's weights.

Token ids in, sampled token ids out with their log-probabilities and the version of the weights that sampled them. A
plain async class: Ray wraps it elsewhere. It never generates before it has been synced, and never tokenises.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import torch

from actors.engine_loop import EngineLoop, Submission
from actors.spool import read_group, write_group
from actors.weights.manifest import WeightManifest
from rlhf.errors import RunError
from rlhf.types import GroupRequest, RolloutInfo, Rollouts, Sampling

T = TypeVar("T")
PREFILL_TOKENS = 8192  # most prompt tokens of one engine step


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutSpec:
    """One engine."""

    name: str  # in messages, e.g. "rollout engine 0"
    model: str  # Hugging Face folder or name; its weights are replaced at the first sync
    dtype: Literal["bfloat16", "float16", "float32"]
    max_model_len: int  # prompt and response, tokens
    max_num_seqs: int  # samples in one step of the engine
    transport: str  # shm, gloo, nccl, ipc
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1  # CPU only
    kv_cache_gib: float | None = 1.0  # None (GPU): what gpu_memory_utilization leaves
    gpu_memory_utilization: float = 0.9
    tensor_parallel: int = 1
    enforce_eager: bool = True
    lora_rank: int | None = None  # adapters alone are synced
    colocated: bool = False  # shares its GPUs with a trainer, with which it takes turns
    trust_remote_code: bool = False
    spool: Path | None = None  # finished groups are kept here
    start_timeout_s: float = 600.0
    call_timeout_s: float = 1800.0  # of a generate or an update


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """A started engine."""

    pid: int
    kv_cache_tokens: int
    start_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineHealth:
    """A look from outside the engine's thread: it answers while a step hangs."""

    version: int | None  # None: not synced yet
    requests_in_flight: int
    last_step_age_s: float
    rss_gib: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReceipt:
    """What an engine has after a sync, by its own account."""

    version: int
    checksum: str


def engine_environment(spec: RolloutSpec) -> dict[str, str]:
    """Variables that must be set before vLLM is imported."""
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the core runs in the engine loop's thread
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if Path(spec.model).exists():
        env["HF_HUB_OFFLINE"] = "1"
    if spec.device == "cpu":
        env["OMP_NUM_THREADS"] = str(spec.threads)
        env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        if spec.enforce_eager:
            env["TORCHDYNAMO_DISABLE"] = "1"  # vLLM compiles its logprob gathering even so: 3 to 15 s for nothing
    return env


class RolloutWorker:
    """Started, then synced, then asked. Methods may be called while others are waited for."""

    def __init__(self, spec: RolloutSpec) -> None:
        self.spec = spec
        self.loop = EngineLoop(lambda: build_engine(spec), name=spec.name)
        self.version: int | None = None
        self._lora: Any = None
        self._serial = 0
        self._held: list[tuple[int, list[Submission], asyncio.Future[list[Future[Any]]]]] | None = None
        self._arrived = asyncio.Condition()

    async def start(self) -> EngineInfo:
        """Load the model. RunError if that fails or takes longer than start_timeout_s."""
        began = time.monotonic()
        await self._wait(self.loop.start(), "its start", self.spec.start_timeout_s)
        tokens = await self._call(_kv_cache_tokens, "its size", 10.0)
        return EngineInfo(pid=os.getpid(), kv_cache_tokens=tokens, start_s=time.monotonic() - began)

    async def generate(self, request: GroupRequest, sampling: Sampling) -> tuple[Rollouts, tuple[RolloutInfo, ...]]:
        """Draw one response a seed. A spooled group is on disk before this returns."""
        version = self._synced_version()
        submissions = self._submissions(request, sampling)
        if self._held is None:
            futures = self.loop.submit(submissions)
        else:
            started: asyncio.Future[list[Future[Any]]] = asyncio.get_running_loop().create_future()
            async with self._arrived:
                self._held.append((request.group_id, submissions, started))
                self._arrived.notify_all()
            futures = await self._within(started, f"the release of group {request.group_id}")
        outputs = await asyncio.gather(
            *[self._wait(f, f"group {request.group_id}", self.spec.call_timeout_s) for f in futures]
        )
        rollouts, infos = assemble(request, outputs)
        if self.spec.spool is not None:
            await asyncio.to_thread(write_group, self.spec.spool, request, version, rollouts, infos)
        return rollouts, infos

    async def read_spooled(
        self, request: GroupRequest, version: int
    ) -> tuple[Rollouts, tuple[RolloutInfo, ...]] | None:
        """The group as these weights answered it before, if it was finished. None: it was not."""
        if self.spec.spool is None:
            return None
        return await asyncio.to_thread(read_group, self.spec.spool, request, version)

    async def hold(self) -> None:
        """Let the requests that come from now on wait, and forget cached prefixes.

        With `release` this makes the composition of every engine step, hence every bit of every log-probability, a
        function of the requests and the weights alone.
        """
        await self._call(_reset_caches, "the reset of its caches", self.spec.call_timeout_s)
        self._held = []

    async def release(self, num_groups: int) -> None:
        """Wait until that many groups have come since `hold`, then start them in one step, by group id and sample."""
        held = self._held
        if held is None:
            raise RunError(f"{self.spec.name}: release without hold")
        async with self._arrived:
            try:
                await asyncio.wait_for(
                    self._arrived.wait_for(lambda: len(held) >= num_groups), self.spec.call_timeout_s
                )
            except TimeoutError as error:
                raise RunError(
                    f"{self.spec.name}: {len(held)} of {num_groups} groups came in {self.spec.call_timeout_s:.0f} s"
                ) from error
        self._held = None
        held.sort(key=lambda entry: entry[0])
        futures = iter(self.loop.submit([sample for _, samples, _ in held for sample in samples]))
        for _, samples, started in held:
            started.set_result([next(futures) for _ in samples])

    async def update_weights(self, manifest: WeightManifest, version: int) -> SyncReceipt:
        """Load a published set of weights between two steps. Samples in flight go on with the new ones.

        RunError if the weights that arrived are not the published ones.
        """
        if manifest.version != version:
            raise RunError(f"{self.spec.name}: asked for version {version}, the manifest holds {manifest.version}")
        self.version = None  # whatever happens: no sample by half-loaded weights
        checksums = await self._call(
            lambda engine: _load_weights(engine, manifest),
            f"version {version} of the weights",
            self.spec.call_timeout_s,
        )
        wrong = [(rank, found) for rank, found in enumerate(checksums) if found != manifest.checksum]
        if wrong:
            raise RunError(
                f"{self.spec.name}: weight sync to version {version}: worker {wrong[0][0]} read bytes with checksum "
                f"{wrong[0][1]}, the policy wrote {manifest.checksum}. The weights were damaged on the way."
            )
        stamp = await self._call(lambda engine: engine.get_weight_version(), "its version", self.spec.call_timeout_s)
        self.version = int(stamp)
        return SyncReceipt(version=self.version, checksum=checksums[0])

    async def probe(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probabilities of token_ids[1:], by the forward pass that rollouts go through, not out of a cache."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, skip_reading_prefix_cache=True
        )
        submission = Submission(
            request_id=self._next_id("probe"), prompt_token_ids=tuple(token_ids), params=params, lora=self._lora
        )
        (future,) = self.loop.submit([submission])
        output = await self._wait(future, "the probe", self.spec.call_timeout_s)
        return [at[token].logprob for at, token in zip(output.prompt_logprobs[1:], token_ids[1:], strict=True)]

    async def abort_all(self) -> int:
        """Drop every request in flight; how many. Their `generate` raises RunError."""
        return await self._wait(self.loop.abort_all(), "an abort", self.spec.call_timeout_s)

    async def health(self) -> EngineHealth:
        """Never waits for the engine."""
        return EngineHealth(
            version=self.version,
            requests_in_flight=self.loop.num_waiting,
            last_step_age_s=time.monotonic() - self.loop.last_step,
            rss_gib=psutil.Process().memory_info().rss / 2**30,
        )

    async def shutdown(self) -> None:
        """End the engine."""
        if not await asyncio.to_thread(self.loop.stop, timeout_s=30.0):
            raise RunError(f"{self.spec.name}: a step did not end in 30 s, so the engine could not be shut down")

    def _synced_version(self) -> int:
        if self.version is None:
            raise RunError(
                f"{self.spec.name} has not been given the policy's weights, so it does not generate. "
                "It must be synced first."
            )
        return self.version

    def _next_id(self, kind: str) -> str:
        self._serial += 1
        return f"{kind}-{self._serial}"

    def _submissions(self, request: GroupRequest, sampling: Sampling) -> list[Submission]:
        length = len(request.prompt.token_ids) + sampling.max_new_tokens
        if length > self.spec.max_model_len:
            raise RunError(
                f"{self.spec.name}: prompt {request.prompt.prompt_id} has {len(request.prompt.token_ids)} tokens, with "
                f"max_new_tokens {sampling.max_new_tokens} that is more than the engine's {self.spec.max_model_len}"
            )
        return [
            Submission(
                request_id=self._next_id(f"group{request.group_id}"),
                prompt_token_ids=request.prompt.token_ids,
                params=sampling_params(sampling, seed),
                lora=self._lora,
            )
            for seed in request.seeds
        ]

    async def _call(self, work: Callable[[Any], T], what: str, deadline_s: float) -> T:
        return await self._wait(self.loop.call(work), what, deadline_s)

    async def _wait(self, future: Future[T], what: str, deadline_s: float) -> T:
        return await self._within(asyncio.wrap_future(future), what, deadline_s)

    async def _within(self, awaitable: Awaitable[T], what: str, deadline_s: float | None = None) -> T:
        """The result, or RunError saying what was waited for."""
        limit = self.spec.call_timeout_s if deadline_s is None else deadline_s
        try:
            return await asyncio.wait_for(awaitable, limit)
        except TimeoutError as error:
            raise RunError(
                f"{self.spec.name}: waited {limit:.0f} s for {what}; {self.loop.num_waiting} requests in flight, last "
                f"step {time.monotonic() - self.loop.last_step:.0f} s ago"
            ) from error


def build_engine(spec: RolloutSpec) -> Any:
    """vLLM's engine, with its core in the calling thread."""
    from vllm import EngineArgs
    from vllm.config import WeightTransferConfig
    from vllm.v1.engine.llm_engine import LLMEngine

    cpu = spec.device == "cpu"
    return LLMEngine.from_engine_args(
        EngineArgs(
            model=spec.model,
            dtype=spec.dtype,
            max_model_len=spec.max_model_len,
            max_num_seqs=spec.max_num_seqs,
            max_num_batched_tokens=max(PREFILL_TOKENS, spec.max_model_len),
            tensor_parallel_size=spec.tensor_parallel,
            gpu_memory_utilization=spec.gpu_memory_utilization,
            kv_cache_memory_bytes=None if spec.kv_cache_gib is None else int(spec.kv_cache_gib * 2**30),
            enforce_eager=spec.enforce_eager,
            enable_chunked_prefill=not cpu,  # on a CPU a seeded sample in a partial prefill ends the engine
            enable_sleep_mode=spec.colocated and not cpu,
            logprobs_mode="processed_logprobs",  # of the distribution that was sampled from
            enable_lora=spec.lora_rank is not None,
            max_lora_rank=spec.lora_rank or 16,
            trust_remote_code=spec.trust_remote_code,
            worker_extension_cls="actors.weights.vllm_extension.WorkerExtension",
            weight_transfer_config=WeightTransferConfig(backend=spec.transport),
            disable_log_stats=True,
        )
    )


def sampling_params(sampling: Sampling, seed: int) -> Any:
    """vLLM's parameters for one sample."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=0 if sampling.top_k is None else sampling.top_k,
        max_tokens=sampling.max_new_tokens,
        seed=seed,
        stop=list(sampling.stop),
        include_stop_str_in_output=True,
        detokenize=bool(sampling.stop),  # text is only looked at for stop strings
        logprobs=0,  # the sampled token's
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def assemble(request: GroupRequest, outputs: Sequence[Any]) -> tuple[Rollouts, tuple[RolloutInfo, ...]]:
    """One group's columns and scalars out of vLLM's final outputs, one a seed."""
    prompt = torch.tensor(request.prompt.token_ids, dtype=torch.int64)
    ids, masks, logprobs, versions, infos = [], [], [], [], []
    for index, output in enumerate(outputs):
        (sample,) = output.outputs
        response = torch.tensor(sample.token_ids, dtype=torch.int64)
        sampled = torch.tensor(sample.logprobs.logprobs, dtype=torch.float32)
        by_token = torch.cat([torch.full((s.end - s.start,), int(s.version)) for s in sample.weight_versions])
        if not len(response) == len(sampled) == len(by_token):
            raise RunError(
                f"group {request.group_id}, sample {index}: the engine returned {len(response)} tokens with "
                f"{len(sampled)} log-probabilities and {len(by_token)} versions"
            )
        ids += [prompt, response]
        masks += [torch.zeros(len(prompt), dtype=torch.bool), torch.ones(len(response), dtype=torch.bool)]
        logprobs += [torch.zeros(len(prompt)), sampled]
        versions += [torch.full((len(prompt),), -1), by_token]
        infos.append(
            RolloutInfo(
                sequence_id=request.first_sequence_id + index,
                num_prompt_tokens=len(prompt),
                num_response_tokens=len(response),
                finish_reason=sample.finish_reason,
                min_version=int(by_token.min()),
                max_version=int(by_token.max()),
                mean_logprob=float(sampled.mean()),
            )
        )
    rollouts = Rollouts(
        sequence_ids=torch.tensor([info.sequence_id for info in infos], dtype=torch.int64),
        lengths=torch.tensor([info.num_prompt_tokens + info.num_response_tokens for info in infos]),
        token_ids=torch.cat(ids),
        response_mask=torch.cat(masks),
        rollout_logprobs=torch.cat(logprobs),
        versions=torch.cat(versions),
    )
    return rollouts, tuple(infos)


def _reset_caches(engine: Any) -> None:
    """Forget every cached prefix. Samples in flight compute theirs again, by the weights of then."""
    if not engine.reset_prefix_cache(reset_running_requests=True):
        raise RunError("the engine did not reset its prefix cache")


def _load_weights(engine: Any, manifest: WeightManifest) -> list[str]:
    """Runs between two steps, so nothing is computed by half-loaded weights. The workers' checksums."""
    engine.collective_rpc("start_weight_update")
    engine.collective_rpc("update_weights", kwargs={"update_info": manifest.update_info()})
    engine.collective_rpc("finish_weight_update")
    engine.set_weight_version(str(manifest.version))
    _reset_caches(engine)
    checksums: list[str] = engine.collective_rpc("received_checksum")
    return checksums


def _kv_cache_tokens(engine: Any) -> int:
    cache = engine.vllm_config.cache_config
    return int(cache.num_gpu_blocks * cache.block_size)

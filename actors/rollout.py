"""The rollout worker: one vLLM engine that answers groups of requests with the policy's weights.

Token ids in, sampled token ids out with their log-probabilities and the version of the weights that sampled them. With
an environment a response is a conversation, whose other turns alone are tokenised here. A plain async class: Ray wraps
it elsewhere. It never generates before it has been synced.

A frozen engine, which answers with the weights of its own folder, can never be synced: training, whose every rollout
follows a sync, cannot use one.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import psutil

from actors.engine_loop import Aborted, EngineLoop, Submission
from actors.spool import read_group, write_group
from actors.tool_calls import VllmToolCalls
from actors.vllm_engine import (
    RolloutSpec,
    adapter_request,
    added_tokens,
    build_engine,
    engine_environment,
    kv_cache_tokens,
    load_adapter,
    load_weights,
    reset_caches,
    sampling_params,
    serve_own_weights,
)
from actors.weights import Meeting, WeightManifest
from rlhf.engine.distributed import meet_through
from rlhf.errors import RunError, UserError
from rlhf.models.loading import load_tokenizer
from rlhf.roles import EnginePart
from rlhf.rollouts.environments import Conversations, EnvironmentSpec
from rlhf.rollouts.spans import Played, Sampled, assemble
from rlhf.types import GroupRequest, RolloutInfo, Rollouts, Sampling

__all__ = ["EngineHealth", "EngineInfo", "RolloutSpec", "RolloutWorker", "SyncReceipt", "engine_environment"]

T = TypeVar("T")


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
    failure: str | None  # why it answers nothing any more


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReceipt:
    """What an engine has after a sync, by its own account."""

    version: int
    checksum: str


class RolloutWorker:
    """Started, then synced (unless it is frozen), then asked. Methods may be called while others are waited for."""

    def __init__(self, spec: RolloutSpec) -> None:
        self.spec = spec
        self.loop = EngineLoop(lambda: build_engine(spec), name=spec.name)
        self.version: int | None = None
        self._asleep: set[EnginePart] = set()  # whose GPU memory a trainer has now
        self._lora: Any = None
        self._added: dict[str, int] = {}  # special and added tokens by their text
        self._serial = 0
        self._held: list[tuple[int, list[Submission], asyncio.Future[list[Future[Any]]]]] | None = None
        self._refused: RunError | None = None  # why a group that came since `hold` cannot be started
        self._arrived = asyncio.Condition()
        self._conversations: Conversations | None = None
        self._playing: dict[int, asyncio.Future[list[Played]]] = {}  # groups whose conversations go on

    async def start(self) -> EngineInfo:
        """Load the model. RunError if that fails or takes longer than start_timeout_s."""
        began = time.monotonic()
        if self.spec.sender_address is not None:
            meet_through(self.spec.sender_address)  # before vLLM starts NCCL, which chooses an interface once
        await self._wait(self.loop.start(), "its start", self.spec.start_timeout_s)
        tokens = await self._call(kv_cache_tokens, "its size", 10.0)
        self._added = await self._call(added_tokens, "its tokenizer", self.spec.start_timeout_s)
        if self.spec.is_frozen:
            self._lora = await self._call(
                lambda engine: serve_own_weights(engine, self.spec), "its adapter", self.spec.start_timeout_s
            )
            self.version = 0
        if self.spec.environment is not None:
            self._conversations = await self._start_environment(self.spec.environment)
        return EngineInfo(pid=os.getpid(), kv_cache_tokens=tokens, start_s=time.monotonic() - began)

    async def renew(self, spool: Path) -> bool:
        """Forget the run before: as after `start`, for one whose groups go to `spool`. False, and nothing done, if
        requests of it are in flight: they would be written down as the new run's."""
        if (await self.health()).requests_in_flight:
            return False
        self.spec = replace(self.spec, spool=spool)
        self.version = None
        return True

    async def open_weights(self, meeting: Meeting | None, first_rank: int) -> None:
        """Open the engine's end of the weight transport.

        A broadcast meets its sender here; first_rank is the rank of the engine's first worker there.
        """
        self._refuse_frozen()
        settings = {} if meeting is None else {**asdict(meeting), "first_rank": first_rank}
        await self._call(
            lambda engine: engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": settings}),
            "the sender of the weights",
            self.spec.start_timeout_s,
        )

    async def generate(
        self, request: GroupRequest, sampling: Sampling
    ) -> tuple[Rollouts, tuple[RolloutInfo, ...]] | tuple[None, None]:
        """Draw one response a seed; nothing of a group that is cancelled. With a spool the group is on disk before this
        returns.

        A group that was spooled before the run was cut off is what a resumed run gets. It is drawn all the same: the
        others of its batch are then scheduled, and rounded, as they were. Not so a conversation: its turns are
        batched as they come in any case, and an environment may have its price.
        """
        try:
            version = self._synced_version()
            submissions = [] if self._conversations is not None else self._submissions(request, sampling)
        except Exception as error:
            await self._stop_release(request, error)
            raise
        try:
            if self._conversations is None:
                futures = await self._admit(request, submissions)
                outputs = await asyncio.gather(
                    *[self._wait(f, f"group {request.group_id}", self.spec.call_timeout_s) for f in futures]
                )
                played = [_answer(request, sampled_of(output)) for output in outputs]
            else:
                await self._admit(request, submissions)  # none: its turns come later, each by itself
                spooled = await self.read_spooled(request, sampling, version)
                if spooled is not None:
                    return spooled
                played = await self._play(self._conversations, request, sampling)
        except Aborted:
            return None, None
        rollouts, infos = assemble(request, played)
        spooled = await self.read_spooled(request, sampling, version)
        if spooled is not None:
            return spooled
        failed = any(info.environment_error is not None for info in infos)
        if self.spec.spool is not None and not failed:  # whoever resumes has mended the environment
            await asyncio.to_thread(
                write_group, self.spec.spool, request, sampling, version, rollouts, infos, environment=self._played_in
            )
        return rollouts, infos

    async def _admit(self, request: GroupRequest, submissions: list[Submission]) -> list[Future[Any]]:
        """Give a group's samples to the engine, after `release` if the engine holds its requests."""
        if self._held is None:
            return self.loop.submit(submissions)
        started: asyncio.Future[list[Future[Any]]] = asyncio.get_running_loop().create_future()
        async with self._arrived:
            self._held.append((request.group_id, submissions, started))
            self._arrived.notify_all()
        return await self._within(started, f"the release of group {request.group_id}")

    async def _stop_release(self, request: GroupRequest, error: Exception) -> None:
        """End the wait of `release`, if requests are held: a group that failed would never come."""
        if self._held is None:
            return
        async with self._arrived:
            self._refused = self._refused or RunError(f"{self.spec.name}: group {request.group_id}: {error}")
            self._arrived.notify_all()

    async def _start_environment(self, spec: EnvironmentSpec) -> Conversations:
        """Load the environment beside the engine."""
        tokenizer = load_tokenizer(spec.tokenizer, trust_remote_code=spec.trust_remote_code)
        conversations = Conversations(spec, tokenizer, self._draw)
        try:
            description = await conversations.start()
        except UserError as error:  # the driver could load it, so this machine differs from the driver's
            raise RunError(f"{self.spec.name}: {spec.key}: {error}") from error
        if description.tools:
            conversations.parser = VllmToolCalls(spec.tool_parser, tokenizer, description.tools)
        return conversations

    async def _play(self, conversations: Conversations, request: GroupRequest, sampling: Sampling) -> list[Played]:
        """A group's conversations. Aborted if it is cancelled, in whose turn it may be."""
        playing = asyncio.ensure_future(conversations.play(request, request.drawn_by(sampling)))
        self._playing[request.group_id] = playing
        try:
            await asyncio.wait([playing])
        finally:
            del self._playing[request.group_id]
            playing.cancel()
        if playing.cancelled():
            raise Aborted(f"{self.spec.name}: aborted")
        return playing.result()

    async def _draw(
        self, group_id: int, token_ids: tuple[int, ...], seed: int, sampling: Sampling, turn_end: int | None
    ) -> Sampled:
        """One turn of a conversation."""
        submission = Submission(
            request_id=self._next_id(_prefix(group_id)),
            prompt_token_ids=token_ids,
            params=sampling_params(sampling, seed, turn_end=turn_end, added=self._added),
            lora=self._lora,
        )
        (future,) = self.loop.submit([submission])
        return sampled_of(await self._within(asyncio.shield(asyncio.wrap_future(future)), "a turn of a conversation"))

    @property
    def _played_in(self) -> str:
        """What a spooled group must have been played in to be this run's."""
        return "" if self.spec.environment is None else self.spec.environment.fingerprint()

    async def read_spooled(
        self, request: GroupRequest, sampling: Sampling, version: int
    ) -> tuple[Rollouts, tuple[RolloutInfo, ...]] | None:
        """The group as these weights answered it before, if it was finished. None: it was not."""
        if self.spec.spool is None:
            return None
        return await asyncio.to_thread(
            read_group, self.spec.spool, request, sampling, version, environment=self._played_in
        )

    async def hold(self) -> None:
        """Let the requests that come from now on wait, and forget cached prefixes.

        With `release` this makes the composition of every engine step, hence every bit of every log-probability, a
        function of the requests and the weights alone.
        """
        await self._call(reset_caches, "the reset of its caches", self.spec.call_timeout_s)
        self._held, self._refused = [], None

    async def release(self, num_groups: int) -> None:
        """Wait until that many groups have come since `hold`, then start them in one step, by group id and sample.

        RunError as soon as one of the groups is refused.
        """
        held = self._held
        if held is None:
            raise RunError(f"{self.spec.name}: release without hold")
        async with self._arrived:
            try:
                await asyncio.wait_for(
                    self._arrived.wait_for(lambda: self._refused is not None or len(held) >= num_groups),
                    self.spec.call_timeout_s,
                )
            except TimeoutError as error:
                raise RunError(
                    f"{self.spec.name}: {len(held)} of {num_groups} groups came in {self.spec.call_timeout_s:.0f} s"
                ) from error
        self._held = None
        if self._refused is not None:
            for _, _, started in held:
                if not started.done():  # otherwise its `generate` has given up
                    started.set_exception(self._refused)
            raise self._refused
        held.sort(key=lambda entry: entry[0])
        futures = iter(self.loop.submit([sample for _, samples, _ in held for sample in samples]))
        for _, samples, started in held:
            started.set_result([next(futures) for _ in samples])

    async def update_weights(self, manifest: WeightManifest, version: int) -> SyncReceipt:
        """Load a published set of weights between two steps. Samples in flight go on with the new ones.

        RunError if the weights that arrived are not the published ones, or the engine is frozen.
        """
        self._refuse_frozen()
        self._refuse_asleep("weights")
        if manifest.version != version:
            raise RunError(f"{self.spec.name}: asked for version {version}, the manifest holds {manifest.version}")
        self.version = None  # whatever happens: no sample by half-loaded weights
        is_adapter = manifest.transport == "adapter"
        load = load_adapter if is_adapter else load_weights
        loaded = await self._call(
            lambda engine: load(engine, manifest), f"version {version} of the weights", self.spec.call_timeout_s
        )
        wrong = [(rank, found) for rank, found in enumerate(loaded.checksums) if found != manifest.checksum]
        if wrong:
            raise RunError(
                f"{self.spec.name}: weight sync to version {version}: worker {wrong[0][0]} read bytes with checksum "
                f"{wrong[0][1]}, the policy wrote {manifest.checksum} for version {manifest.version}. The weights "
                "were damaged in transit."
            )
        if loaded.cached_blocks:
            raise RunError(
                f"{self.spec.name}: weight sync to version {version}: {loaded.cached_blocks} blocks of keys and values "
                "that earlier weights computed are still cached"
            )
        self._lora = adapter_request(manifest) if is_adapter else None
        self.version = loaded.version
        return SyncReceipt(version=loaded.version, checksum=loaded.checksums[0])

    async def probe(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probabilities of token_ids[1:], by the forward pass that rollouts go through, not out of a cache."""
        self._refuse_asleep("weights", "cache")
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, skip_reading_prefix_cache=True
        )
        submission = Submission(
            request_id=self._next_id("probe-"), prompt_token_ids=tuple(token_ids), params=params, lora=self._lora
        )
        (future,) = self.loop.submit([submission])
        output = await self._wait(future, "the probe", self.spec.call_timeout_s)
        return [at[token].logprob for at, token in zip(output.prompt_logprobs[1:], token_ids[1:], strict=True)]

    async def sleep(self, *, keep_weights: bool) -> None:
        """Give the GPU to the trainer: the cache goes, and the weights, unless they are to be kept in host memory.

        Weights that go are brought again by the next sync. With LoRA the base weights are kept always, since no sync
        brings them. On a CPU nothing happens.
        """
        if self.spec.device == "cpu":
            return
        keeps = keep_weights or self.spec.lora_rank is not None
        if not keeps:
            self.version = None
        self._asleep = {"weights", "cache"}
        await self._call(lambda engine: engine.sleep(level=1 if keeps else 2), "its sleep", self.spec.call_timeout_s)

    async def wake(self, part: EnginePart) -> None:
        """Take a part of the GPU's memory back: first that of the weights, which a sync may fill, then the cache's."""
        if self.spec.device == "cuda":
            tag = {"weights": "weights", "cache": "kv_cache"}[part]
            await self._call(lambda engine: engine.wake_up(tags=[tag]), f"the {part} to wake", self.spec.call_timeout_s)
            self._asleep.discard(part)

    async def gpu_peak_gib(self) -> float | None:
        """The most GPU memory that the allocator of one of the engine's workers has held. None on a CPU."""
        if self.spec.device == "cpu":
            return None
        peaks: list[float] = await self._call(
            lambda engine: engine.collective_rpc("gpu_peak_gib"), "its memory", self.spec.call_timeout_s
        )
        return max(peaks)

    async def cancel(self, group_ids: Sequence[int]) -> int:
        """Drop what is left of these groups; how many samples. Other groups go on."""
        for playing in [self._playing[group_id] for group_id in group_ids if group_id in self._playing]:
            playing.cancel()
        prefixes = [_prefix(group_id) for group_id in group_ids]
        return await self._wait(self.loop.abort(prefixes), "an abort", self.spec.call_timeout_s)

    async def health(self) -> EngineHealth:
        """Never waits for the engine."""
        return EngineHealth(
            version=self.version,
            requests_in_flight=self.loop.num_waiting,
            last_step_age_s=time.monotonic() - self.loop.last_step,
            rss_gib=psutil.Process().memory_info().rss / 2**30,
            failure=None if self.loop.failure is None else str(self.loop.failure),
        )

    async def shutdown(self) -> None:
        """End the engine and the environment."""
        if self._conversations is not None:
            await self._conversations.stop()
        if not await asyncio.to_thread(self.loop.stop, timeout_s=30.0):
            raise RunError(f"{self.spec.name}: a step did not end in 30 s, so the engine could not be shut down")

    def _refuse_frozen(self) -> None:
        if self.spec.is_frozen:
            raise RunError(
                f"{self.spec.name} is frozen: it answers with the weights of {self.spec.model} and no others."
            )

    def _refuse_asleep(self, *parts: EnginePart) -> None:
        asleep = [part for part in parts if part in self._asleep]
        if asleep:
            raise RunError(f"{self.spec.name} is asleep: its {asleep[0]} must be woken first.")

    def _synced_version(self) -> int:
        if self.version is None:
            raise RunError(
                f"{self.spec.name} has not been given the policy's weights, so it does not generate. "
                "It must be synced first."
            )
        self._refuse_asleep("weights", "cache")
        return self.version

    def _next_id(self, kind: str) -> str:
        self._serial += 1
        return f"{kind}{self._serial}"

    def _submissions(self, request: GroupRequest, sampling: Sampling) -> list[Submission]:
        length = len(request.prompt.token_ids) + sampling.max_new_tokens
        if length > self.spec.max_model_len:
            raise RunError(
                f"{self.spec.name}: prompt {request.prompt.prompt_id} has {len(request.prompt.token_ids)} tokens, with "
                f"max_new_tokens {sampling.max_new_tokens} that is more than the engine's {self.spec.max_model_len}"
            )
        return [
            Submission(
                request_id=self._next_id(_prefix(request.group_id)),
                prompt_token_ids=request.prompt.token_ids,
                params=sampling_params(
                    request.drawn_by(sampling), seed, turn_end=request.prompt.turn_end, added=self._added
                ),
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


def _prefix(group_id: int) -> str:
    """What the ids of a group's requests begin with, and no other group's."""
    return f"group{group_id}-"


def _answer(request: GroupRequest, sampled: Sampled) -> Played:
    return Played(prompt_token_ids=request.prompt.token_ids, spans=(sampled,), finish_reason=sampled.finish_reason)


def sampled_of(output: Any) -> Sampled:
    """vLLM's final output of one request."""
    (sample,) = output.outputs
    return Sampled(
        token_ids=tuple(sample.token_ids),
        logprobs=tuple(sample.logprobs.logprobs),
        versions=tuple(int(s.version) for s in sample.weight_versions for _ in range(s.start, s.end)),
        finish_reason=sample.finish_reason,
    )

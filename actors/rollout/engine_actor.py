"""The rollout worker: one vLLM engine that answers groups of requests with the policy's weights.

Prompts come in as token ids. Sampled token ids go out with their log-probabilities and the version of the weights that
sampled them. With an environment a response is a conversation, and only the turns of the environment are tokenised
here. It never generates before it has been synced.

A frozen engine answers with the weights of its model folder and refuses every sync. Training cannot use one, since each
of its rollouts follows a sync.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import psutil

from actors.rollout.engine_thread import Aborted, EngineLoop, Submission
from actors.rollout.tool_calls import VllmToolCalls
from actors.rollout.vllm_engine import (
    RolloutSpec,
    adapter_request,
    added_tokens,
    build_engine,
    engine_environment,
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
from rlhf.rollouts.environments.conversations import Conversations, EnvironmentSpec
from rlhf.rollouts.records.spans import Played, Sampled, assemble
from rlhf.rollouts.records.spool import read_group, write_group
from rlhf.types import GroupRequest, RolloutInfo, Rollouts, Sampling

__all__ = ["EngineHealth", "RolloutSpec", "RolloutWorker", "SyncReceipt", "engine_environment"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineHealth:
    """The state of an engine as seen from outside its thread. It is available even while a step hangs."""

    version: int | None  # None: not synced yet
    requests_in_flight: int
    last_step_age_s: float
    rss_gib: float
    failure: str | None  # why it no longer answers


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReceipt:
    """The version and the checksum reported by an engine after a sync."""

    version: int
    checksum: str


class RolloutWorker:
    """Starts an engine, syncs it unless it is frozen, and generates. Its methods may be called concurrently."""

    def __init__(self, spec: RolloutSpec) -> None:
        self.spec = spec
        self.loop = EngineLoop(lambda: build_engine(spec), name=spec.name)
        self.version: int | None = None
        self.checksum = ""  # of the weights of this version
        self._asleep: set[EnginePart] = set()  # parts whose GPU memory a trainer uses now
        self._lora: Any = None
        self._added: dict[str, int] = {}  # special and added tokens by their text
        self._serial = 0
        self._held: list[tuple[int, list[Submission], asyncio.Future[list[Future[Any]]]]] | None = None
        self._refused: RunError | None = None  # the error of a group submitted since `hold`
        self._arrived = asyncio.Condition()
        self._conversations: Conversations | None = None
        self._playing: dict[int, asyncio.Future[list[Played]]] = {}  # groups with running conversations

    async def start(self) -> None:
        """Load the model. RunError if that fails or takes longer than start_timeout_s."""
        if self.spec.sender_address is not None:
            meet_through(self.spec.sender_address)  # before vLLM starts NCCL, which chooses an interface once
        await self._wait(self.loop.start(), "its start", self.spec.start_timeout_s)
        self._added = await self._call(added_tokens, "its tokenizer", self.spec.start_timeout_s)
        if self.spec.is_frozen:
            self._lora = await self._call(
                lambda engine: serve_own_weights(engine, self.spec), "its adapter", self.spec.start_timeout_s
            )
            self.version = 0
        if self.spec.environment is not None:
            self._conversations = await self._start_environment(self.spec.environment)

    async def renew(self, spool: Path) -> bool:
        """Prepare for another run, whose groups go to `spool`.

        Return False and do nothing if requests are in flight: they would be recorded as responses of the new run.
        """
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
        settings = {"meeting": meeting, "first_rank": first_rank}
        await self._call(
            lambda engine: engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": settings}),
            "the sender of the weights",
            self.spec.start_timeout_s,
        )

    async def generate(
        self, request: GroupRequest, sampling: Sampling, version: int | None = None
    ) -> tuple[Rollouts, tuple[RolloutInfo, ...]] | tuple[None, None]:
        """Draw one response for each seed by the weights of `version`, or return nothing if the group is cancelled.

        With a spool the group is on disk before this returns, and a resumed run gets the spooled group. The engine
        draws it all the same, because the other groups of the batch are then scheduled and rounded as before. A
        conversation is not drawn again: its turns are batched as they arrive in any case, and its environment may cost
        money. Groups of an earlier version come from the spool alone. RunError: the spool has no such group.

        Args:
            version: the version of the weights, by default the engine's.
        """
        try:
            current = self._synced_version()
            drawn_by = current if version is None else version
            is_current = drawn_by == current
            draws = self._conversations is None and is_current
            submissions = self._submissions(request, sampling) if draws else []
        except Exception as error:
            await self._stop_release(request, error)
            raise
        try:
            if draws:
                futures = await self._admit(request, submissions)
                outputs = await asyncio.gather(*[self._wait(f, f"group {request.group_id}") for f in futures])
                played = [_answer(request, sampled_of(output)) for output in outputs]
            else:
                await self._admit(request, submissions)  # none: a turn comes later, by itself
                spooled = await self.read_spooled(request, sampling, drawn_by)
                if spooled is not None:
                    return spooled
                if self._conversations is None or not is_current:
                    raise RunError(
                        f"{self.spec.name} has version {self.version} of the weights, and group {request.group_id} of "
                        f"version {drawn_by} is not in its spool. Resume with rollouts.max_staleness=0, which samples "
                        "the batches ahead again."
                    )
                played = await self._play(self._conversations, request, sampling)
        except Aborted:
            return None, None
        rollouts, infos = assemble(request, played)
        spooled = await self.read_spooled(request, sampling, drawn_by)
        if spooled is not None:
            return spooled
        failed = any(info.environment_error is not None for info in infos)
        if self.spec.spool is not None and (self.spec.spools_failures or not failed):
            await asyncio.to_thread(
                write_group,
                self.spec.spool,
                request,
                sampling,
                drawn_by,
                rollouts,
                infos,
                environment=self._played_in,
                weights=self.checksum,
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
        """End the wait of `release` if requests are held, because a refused group never arrives."""
        if self._held is None:
            return
        async with self._arrived:
            self._refused = self._refused or RunError(f"{self.spec.name}: group {request.group_id}: {error}")
            self._arrived.notify_all()

    async def _start_environment(self, spec: EnvironmentSpec) -> Conversations:
        """Load the environment into this process."""
        tokenizer = load_tokenizer(spec.tokenizer, trust_remote_code=spec.trust_remote_code, template=spec.template)
        conversations = Conversations(spec, tokenizer, self._draw)
        try:
            description = await conversations.start()
        except UserError as error:  # the driver could load it, so this machine differs from the driver's
            raise RunError(f"{self.spec.name}: {spec.key}: {error}") from error
        if description.tools:
            conversations.parser = VllmToolCalls(spec.tool_parser, tokenizer, description.tools)
        return conversations

    async def _play(self, conversations: Conversations, request: GroupRequest, sampling: Sampling) -> list[Played]:
        """Play the conversations of a group. Aborted if the group is cancelled, at any turn."""
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
        """Sample one turn of a conversation."""
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
        """Return the fingerprint of the environment: a spooled group of another environment is not used."""
        return "" if self.spec.environment is None else self.spec.environment.fingerprint()

    async def read_spooled(
        self, request: GroupRequest, sampling: Sampling, version: int
    ) -> tuple[Rollouts, tuple[RolloutInfo, ...]] | None:
        """Return the group as the same weights answered it before, or None if it was not finished."""
        if self.spec.spool is None:
            return None
        return await asyncio.to_thread(
            read_group,
            self.spec.spool,
            request,
            sampling,
            version,
            environment=self._played_in,
            weights=self.checksum if version == self.version else None,
        )

    async def hold(self) -> None:
        """Hold back the requests that arrive from now on, and forget cached prefixes.

        With `release` this makes the composition of every engine step a function of the requests and the weights alone.
        It therefore fixes every bit of every log-probability.
        """
        await self._call(reset_caches, "the reset of its caches")
        self._held, self._refused = [], None

    async def release(self, num_groups: int) -> None:
        """Wait until that many groups have arrived since `hold`, then start them in one step, by group id and sample.

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
                    f"{self.spec.name}: only {len(held)} of {num_groups} groups arrived within "
                    f"{self.spec.call_timeout_s:.0f} s"
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
        """Load a published set of weights between two steps. Samples in flight continue with the new weights.

        RunError: the checksum of the received weights is wrong, or the engine is frozen.
        """
        self._refuse_frozen()
        self._refuse_asleep("weights")
        if manifest.version != version:
            raise RunError(
                f"{self.spec.name}: version {version} was requested, but the manifest describes version "
                f"{manifest.version}"
            )
        self.version = None  # in any case: no sample from half-loaded weights
        is_adapter = manifest.transport == "adapter"
        load = load_adapter if is_adapter else load_weights
        loaded = await self._call(lambda engine: load(engine, manifest), f"version {version} of the weights")
        wrong = [(rank, checksum) for rank, checksum in enumerate(loaded.checksums) if checksum != manifest.checksum]
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
        self.version, self.checksum = loaded.version, loaded.checksums[0]
        return SyncReceipt(version=loaded.version, checksum=loaded.checksums[0])

    async def probe(self, token_ids: Sequence[int]) -> list[float]:
        """Return the log-probabilities of token_ids[1:] by the forward pass of rollouts, without the cache."""
        self._refuse_asleep("weights", "cache")
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, skip_reading_prefix_cache=True
        )
        submission = Submission(
            request_id=self._next_id("probe-"), prompt_token_ids=tuple(token_ids), params=params, lora=self._lora
        )
        (future,) = self.loop.submit([submission])
        output = await self._wait(future, "the probe")
        return [at[token].logprob for at, token in zip(output.prompt_logprobs[1:], token_ids[1:], strict=True)]

    async def sleep(self, *, keep_weights: bool) -> None:
        """Give the GPU to the trainer: free the cache, and the weights unless keep_weights moves them to host memory.

        The next sync brings freed weights again. With LoRA the base weights are always kept, since no sync brings them.
        On a CPU this does nothing.
        """
        if self.spec.device == "cpu":
            return
        keeps = keep_weights or self.spec.lora_rank is not None
        if not keeps:
            self.version = None
        self._asleep = {"weights", "cache"}
        await self._call(lambda engine: engine.sleep(level=1 if keeps else 2), "its sleep")

    async def wake(self, part: EnginePart) -> None:
        """Take GPU memory back: first for the weights (a sync may fill it), then for the cache."""
        if self.spec.device == "cuda":
            tag = {"weights": "weights", "cache": "kv_cache"}[part]
            await self._call(lambda engine: engine.wake_up(tags=[tag]), f"the {part} to wake")
            self._asleep.discard(part)

    async def gpu_peak_gib(self) -> float | None:
        """Return the peak GPU memory of the engine's largest worker, or None on a CPU."""
        if self.spec.device == "cpu":
            return None
        peaks: list[float] = await self._call(lambda engine: engine.collective_rpc("gpu_peak_gib"), "its memory")
        return max(peaks)

    async def cancel(self, group_ids: Sequence[int]) -> int:
        """Drop the samples of these groups that are not finished, and return how many there were."""
        for playing in [self._playing[group_id] for group_id in group_ids if group_id in self._playing]:
            playing.cancel()
        prefixes = [_prefix(group_id) for group_id in group_ids]
        return await self._wait(self.loop.abort(prefixes), "an abort")

    async def health(self) -> EngineHealth:
        """Return the engine's state without waiting for it."""
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
                f"{self.spec.name} has not received the policy's weights yet, so it cannot generate. "
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

    async def _call(self, work: Callable[[Any], T], operation: str, deadline_s: float | None = None) -> T:
        return await self._wait(self.loop.call(work), operation, deadline_s)

    async def _wait(self, future: Future[T], operation: str, deadline_s: float | None = None) -> T:
        return await self._within(asyncio.wrap_future(future), operation, deadline_s)

    async def _within(self, awaitable: Awaitable[T], operation: str, deadline_s: float | None = None) -> T:
        """Return the result. RunError names the awaited operation after the deadline."""
        limit = self.spec.call_timeout_s if deadline_s is None else deadline_s
        try:
            return await asyncio.wait_for(awaitable, limit)
        except TimeoutError as error:
            raise RunError(
                f"{self.spec.name}: waited {limit:.0f} s for {operation}; {self.loop.num_waiting} requests in flight, "
                f"last step {time.monotonic() - self.loop.last_step:.0f} s ago"
            ) from error


def _prefix(group_id: int) -> str:
    """Return the prefix of the request ids of a group. No other group has the same."""
    return f"group{group_id}-"


def _answer(request: GroupRequest, sampled: Sampled) -> Played:
    return Played(prompt_token_ids=request.prompt.token_ids, spans=(sampled,), finish_reason=sampled.finish_reason)


def sampled_of(output: Any) -> Sampled:
    """Convert vLLM's final output of one request."""
    (sample,) = output.outputs
    return Sampled(
        token_ids=tuple(sample.token_ids),
        logprobs=tuple(sample.logprobs.logprobs),
        versions=tuple(int(s.version) for s in sample.weight_versions for _ in range(s.start, s.end)),
        finish_reason=sample.finish_reason,
    )

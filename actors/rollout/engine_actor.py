"""The rollout worker: one vLLM engine that answers groups of requests with the policy's weights.

Prompts come in as token ids. Sampled token ids go out with log-probabilities and the version of the sampling weights.
With an environment a response is a conversation, and only the turns of the environment are tokenised here. The worker
never generates before a sync. A frozen engine answers with the weights of a model folder and refuses every sync.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil

from actors.rollout.continuation import CarriedGroups, continued_responses, response_of, rest_params
from actors.rollout.dispatch import EngineCapacity
from actors.rollout.engine_calls import EngineCalls
from actors.rollout.engine_spool import EngineSpool, Group
from actors.rollout.engine_thread import Aborted, EngineLoop, Submission
from actors.rollout.engine_weights import EngineWeights, SyncReceipt
from actors.rollout.held_requests import HeldRequests
from actors.rollout.image_inputs import ImageInputs
from actors.rollout.tool_calls import VllmToolCalls
from actors.rollout.vllm_engine import (
    RolloutSpec,
    add_experts,
    added_tokens,
    build_engine,
    end_tokens,
    engine_environment,
    kv_cache_tokens,
    reset_caches,
    sampling_params,
)
from actors.weights import Meeting, WeightManifest
from rlhf.agents.sessions import AgentSpec
from rlhf.engine.distributed import meet_through
from rlhf.errors import RunError, UserError
from rlhf.models.files.loading import load_tokenizer
from rlhf.roles import EnginePart
from rlhf.rollouts.environments.conversations import Conversations, EnvironmentSpec
from rlhf.rollouts.records.begun import Begun
from rlhf.rollouts.records.spans import Played, Sampled, assemble
from rlhf.types import GroupRequest, RolloutInfo, Sampling

__all__ = ["EngineHealth", "RolloutSpec", "RolloutWorker", "SyncReceipt", "engine_environment"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineHealth:
    """The state of an engine, available even while a step hangs."""

    version: int | None  # None: not synced yet
    requests_in_flight: int
    last_step_age_s: float
    rss_gib: float
    failure: str | None  # why the engine no longer answers


class Players(Protocol):
    """Answers a group of prompts by several turns of the model."""

    async def group(self, request: GroupRequest, sampling: Sampling) -> Group: ...

    async def stop(self) -> None: ...


class RolloutWorker:
    """Starts an engine, syncs an unfrozen engine, and generates. Methods may be called concurrently."""

    def __init__(self, spec: RolloutSpec) -> None:
        self.spec = spec
        complete = add_experts if spec.records_experts else None
        self.images = None if spec.images is None else ImageInputs(spec.model, spec.images)
        self.loop = EngineLoop(lambda: build_engine(spec), name=spec.name, complete=complete, images=self.images)
        self.calls = EngineCalls(self.loop, deadline_s=spec.call_timeout_s)
        self.held = HeldRequests(self.calls)
        self.weights = EngineWeights(spec, self.calls)
        self.spool = self._spool_in(spec.spool)
        self.carried = CarriedGroups(spec.spool if spec.carries_over else None)
        self._added: dict[str, int] = {}  # special and added tokens by their text
        self._serial = 0
        self._players: Players | None = None  # None: one turn answers a prompt
        self._working: dict[int, asyncio.Future[Any]] = {}  # on groups that `cancel` interrupts, by group id

    async def start(self) -> None:
        """Load the model. RunError on failure or after start_timeout_s."""
        if self.spec.sender_address is not None:
            meet_through(self.spec.sender_address)  # before vLLM starts NCCL, which chooses an interface once
        await self.open()
        if self.spec.is_frozen:
            await self.weights.serve_own()
        if (environment := self.spec.environment) is not None:
            try:
                self._players = await self.start_players(environment)
            except UserError as error:  # loaded on the driver, so this machine differs from the driver's
                raise RunError(f"{self.spec.name}: {environment.key}: {error}") from error

    async def open(self) -> None:
        """Start the engine."""
        await self.calls.wait(self.loop.start(), "its start", self.spec.start_timeout_s)
        self._added = await self.calls.run(added_tokens, "its tokenizer", self.spec.start_timeout_s)

    async def forget_prefixes(self) -> None:
        """Forget every cached prefix."""
        await self.calls.run(reset_caches, "the reset of its caches")

    async def end_tokens(self) -> frozenset[int]:
        """Return the tokens at which the model ends a response."""
        return await self.calls.run(end_tokens, "its end tokens")

    def params(self, sampling: Sampling, seed: int, turn_end: int | None) -> Any:
        """Return the engine's parameters for one sample. `turn_end`: see `sampling_params`."""
        return sampling_params(sampling, seed, turn_end=turn_end, added=self._added)

    async def renew(self, spool: Path) -> bool:
        """Prepare for another run, with `spool` for the run's groups.

        With requests in flight, do nothing and return False, since the new run would record their responses.
        """
        if self.loop.num_waiting:
            return False
        await self.forget_prefixes()
        self.spool = self._spool_in(spool)
        self.carried = CarriedGroups(spool if self.spec.carries_over else None)
        self.weights.version = None
        return True

    def _spool_in(self, folder: Path | None) -> EngineSpool:
        environment = self.spec.environment
        fingerprint = "" if environment is None else environment.fingerprint()
        return EngineSpool(
            folder=folder,
            keeps_failures=self.spec.spools_failures,
            environment=f"{fingerprint}, experts recorded" if self.spec.records_experts else fingerprint,
        )

    async def open_weights(self, meeting: Meeting | None, first_rank: int) -> None:
        """Open the engine's end of the weight transport.

        A broadcast meets the sender here; first_rank is the rank of the engine's first worker in the broadcast.
        """
        self.weights.refuse_frozen()
        settings = {"meeting": meeting, "first_rank": first_rank}
        await self.calls.run(
            lambda engine: engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": settings}),
            "the sender of the weights",
            self.spec.start_timeout_s,
        )

    async def generate(
        self, request: GroupRequest, sampling: Sampling, version: int | None = None
    ) -> Group | tuple[None, None]:
        """Draw one response for each seed by the weights of `version`, or return nothing if the group is cancelled.

        With a spool the group is on disk before the return, and a resumed run gets the spooled group. The engine still
        draws a spooled group, so that the rest of the batch is scheduled and rounded as before. A conversation is not
        drawn again: turns are batched on arrival in any case, and the environment may cost money. The default version
        is the engine's. Groups of earlier versions come only from the spool. RunError: the spool has no such group.
        """
        try:
            current = self.weights.synced_version()
            drawn_by = current if version is None else version
            is_current = drawn_by == current
            draws = self._players is None and is_current
            begun = await self.carried.begun(request, sampling)
            submissions = self._submissions(request, sampling, begun) if draws else []
        except Exception as error:
            self.held.refuse(request.group_id, error)
            raise
        try:
            if draws:
                samples = await self.held.admit(request.group_id, submissions)
                self.carried.follow(request, sampling, begun, samples)
                group = assemble(request, await self._answers(request, begun, samples))
            else:
                await self.held.admit(request.group_id, submissions)  # no sample: turns are sampled later
                spooled = await self.read_spooled(request, sampling, drawn_by)
                if spooled is not None:
                    return spooled
                if self._players is None or not is_current:
                    raise RunError(
                        f"{self.spec.name} has version {current} of the weights, but group {request.group_id} needs "
                        f"version {drawn_by} and is not in the engine's spool. Resume with rollouts.max_staleness=0, "
                        "so that the batches ahead are sampled again."
                    )
                playing = self._players.group(request, request.drawn_by(sampling))
                group = await self._unless_cancelled(request.group_id, playing)
        except Aborted:
            return None, None
        spooled = await self.read_spooled(request, sampling, drawn_by)
        if spooled is not None:
            return spooled
        await self.spool.write(request, sampling, drawn_by, group, weights=self.weights.checksum)
        return group

    async def answer(self, request: GroupRequest, sampling: Sampling, oldest: int) -> Group | tuple[None, None]:
        """Draw one response for each seed at once, by the current weights. Return nothing for a cancelled group.

        With a spool the group is on disk before the return. A spooled group without a token older than `oldest` is
        returned unchanged.
        """
        try:
            return await self._unless_cancelled(request.group_id, self._answer(request, sampling, oldest))
        except Aborted:
            return None, None

    async def _answer(self, request: GroupRequest, sampling: Sampling, oldest: int) -> Group:
        current = await self.weights.settled_version()
        checksum = self.weights.checksum
        spooled = await self.spool.read(request, sampling, oldest=oldest, newest=current)
        if spooled is not None:
            return spooled
        if self._players is None:
            begun = (Begun(),) * len(request.seeds)
            samples = self.loop.submit(self._submissions(request, sampling, begun))
            group = assemble(request, await self._answers(request, begun, samples))
        else:
            group = await self._players.group(request, request.drawn_by(sampling))
        sampled = [info for info in group[1] if info.num_response_tokens]
        versions = {version for info in sampled for version in (info.min_version, info.max_version)}
        weights = checksum if versions <= {current} else ""
        await self.spool.write(request, sampling, max(versions, default=current), group, weights=weights)
        return group

    async def _answers(
        self, request: GroupRequest, begun: Sequence[Begun], samples: Sequence[Future[Any]]
    ) -> list[Played]:
        """Append the samples of a group to the begun responses, or raise Aborted for an unfinished response."""
        outputs = await asyncio.gather(*[self.calls.wait(sample, f"group {request.group_id}") for sample in samples])
        responses = continued_responses(begun, outputs)
        if any(response.finish_reason is None for response in responses):
            raise Aborted(f"{self.spec.name}: interrupted")
        turns, ids = [response.finished() for response in responses], request.prompt.token_ids
        return [Played(prompt_token_ids=ids, spans=(turn,), finish_reason=turn.finish_reason) for turn in turns]

    async def start_players(self, spec: EnvironmentSpec | AgentSpec) -> Players:
        """Load the environment into this process; with a front, load an agent too. UserError: the environment or the
        agent cannot be loaded."""
        assert isinstance(spec, EnvironmentSpec), "an engine without a front has no agent"
        tokenizer = load_tokenizer(spec.tokenizer, trust_remote_code=spec.trust_remote_code, template=spec.template)
        ends = await self.end_tokens()
        images = None if self.images is None else self.images.of_rows
        conversations = Conversations(spec, tokenizer, self._draw, ends, images)
        description = await conversations.start()
        if description.tools:
            conversations.parser = VllmToolCalls(spec.tool_parser, tokenizer, description.tools)
        return conversations

    async def _unless_cancelled(self, group_id: int, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of work on a group. Aborted if the group is cancelled, at any moment."""
        task = asyncio.ensure_future(work)
        self._working[group_id] = task
        try:
            await asyncio.wait([task])
        finally:
            del self._working[group_id]
            task.cancel()
        if task.cancelled():
            raise Aborted(f"{self.spec.name}: aborted")
        return task.result()

    async def _draw(
        self, group_id: int, token_ids: tuple[int, ...], seed: int, sampling: Sampling, turn_end: int | None
    ) -> Sampled:
        """Sample a turn of a conversation."""
        params = self.params(sampling, seed, turn_end)
        (future,) = self.loop.submit([self._submission(_prefix(group_id), token_ids, params)])
        output = await self.calls.within(asyncio.shield(asyncio.wrap_future(future)), "a turn of a conversation")
        return response_of(output, Begun()).finished()

    async def read_spooled(self, request: GroupRequest, sampling: Sampling, version: int) -> Group | None:
        """Return the group as answered before by the same weights. None: unfinished."""
        weights = self.weights.checksum if version == self.weights.version else None
        return await self.spool.read(request, sampling, newest=version, weights=weights)

    async def stored(self, request: GroupRequest, sampling: Sampling, infos: tuple[RolloutInfo, ...]) -> Group:
        """Return the finished group with these scalars from the spool. The spool may hold further answers to the
        request.
        """
        newest = await self.weights.settled_version()
        group = await self.spool.read(request, sampling, oldest=0, newest=newest, infos=infos)
        if group is None:
            raise RunError(
                f"{self.spec.name}: group {request.group_id}, whose tokens were lost, is not in the run's store of "
                "finished groups, or the store has other responses. Continue with --resume auto."
            )
        return group

    async def hold(self) -> None:
        """Hold back all later requests, and forget cached prefixes."""
        await self.forget_prefixes()
        self.held.hold()
        self.carried.forget()

    async def release(self, num_groups: int) -> None:
        """Start all groups in one step, once `num_groups` have arrived since `hold`. RunError: a group is refused."""
        await self.held.release(num_groups)

    async def update_weights(self, manifest: WeightManifest, version: int) -> SyncReceipt:
        return await self.weights.update(manifest, version)

    async def probe(self, token_ids: Sequence[int]) -> list[float]:
        """Return the log-probabilities of token_ids[1:] without images' positions, by the forward pass of rollouts.

        No cached keys and values are read. A cached output of the tower is from the same weights.
        Samples may run during the probe. The probe waits for no sample, not even during a recomputation of tokens.
        """
        self.weights.refuse_asleep("weights", "cache")
        return await self._probed(token_ids, self.weights.lora)

    async def _probed(self, token_ids: Sequence[int], lora: Any) -> list[float]:
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, skip_reading_prefix_cache=True
        )
        (future,) = self.loop.submit([self._submission("probe-", tuple(token_ids), params, lora=lora, is_first=True)])
        output = await self.calls.wait(future, "the probe")
        logprobs = zip(output.prompt_logprobs[1:], token_ids[1:], strict=True)
        return [at[token].logprob for at, token in logprobs if token >= 0]

    async def sleep(self, *, keep_weights: bool) -> None:
        await self.weights.sleep(keep_weights=keep_weights)

    async def wake(self, part: EnginePart) -> None:
        await self.weights.wake(part)

    async def start_profile(self) -> None:
        await self.calls.run(lambda engine: engine.collective_rpc("start_profile"), "the start of a profile")

    async def stop_profile(self, path: Path) -> None:
        """Write the profile of each worker of the engine to a file that begins with `path`."""
        await self.calls.run(lambda engine: engine.collective_rpc("stop_profile", args=(path,)), "a profile")

    async def gpu_peak_gib(self) -> float | None:
        """Return the peak GPU memory of the engine's largest worker, or None on a CPU."""
        if self.spec.device == "cpu":
            return None
        peaks: list[float] = await self.calls.run(lambda engine: engine.collective_rpc("gpu_peak_gib"), "its memory")
        return max(peaks)

    async def capacity(self) -> EngineCapacity:
        tokens = await self.calls.run(kv_cache_tokens, "the size of its cache")
        environment = self.spec.environment
        samples = self.spec.max_num_seqs if environment is None else environment.processes
        return EngineCapacity(cache_tokens=tokens, samples=samples)

    async def cancel(self, group_ids: Sequence[int]) -> int:
        """Drop the unfinished samples of groups, and return their number. Groups to continue later are then on disk."""
        for work in [self._working[group_id] for group_id in group_ids if group_id in self._working]:
            work.cancel()
        prefixes = [_prefix(group_id) for group_id in group_ids]
        dropped = await self.calls.wait(self.loop.abort(prefixes, keeps=self.spec.carries_over), "an abort")
        await self.carried.write(group_ids)
        return dropped

    async def health(self) -> EngineHealth:
        return EngineHealth(
            version=self.weights.version,
            requests_in_flight=self.loop.num_waiting,
            last_step_age_s=time.monotonic() - self.loop.last_step,
            rss_gib=psutil.Process().memory_info().rss / 2**30,
            failure=None if self.loop.failure is None else str(self.loop.failure),
        )

    async def shutdown(self) -> None:
        if self._players is not None:
            await self._players.stop()
        if not await asyncio.to_thread(self.loop.stop, timeout_s=30.0):
            raise RunError(f"{self.spec.name}: a step did not end in 30 s, so the engine could not be shut down")

    def _submission(self, kind: str, token_ids: tuple[int, ...], params: Any, **more: Any) -> Submission:
        self._serial += 1
        more = {"lora": self.weights.lora, **more}
        return Submission(request_id=f"{kind}{self._serial}", prompt_token_ids=token_ids, params=params, **more)

    def _submissions(self, request: GroupRequest, sampling: Sampling, begun: Sequence[Begun]) -> list[Submission]:
        """Return the samples to draw: the rest of each unfinished response."""
        prompt, drawn_by = request.prompt, request.drawn_by(sampling)
        if len(prompt.token_ids) + sampling.max_new_tokens > self.spec.max_model_len:
            raise RunError(
                f"{self.spec.name}: prompt {prompt.prompt_id} has {len(prompt.token_ids)} tokens. With max_new_tokens "
                f"{sampling.max_new_tokens}, this is more than the engine's limit of {self.spec.max_model_len} tokens."
            )
        submissions = []
        for seed, response in zip(request.seeds, begun, strict=True):
            if response.finish_reason is None:
                params = rest_params(self.params(drawn_by, seed, prompt.turn_end), response)
                kind = _prefix(request.group_id)
                submissions.append(self._submission(kind, prompt.token_ids, params, begun=response.token_ids))
        return submissions


def _prefix(group_id: int) -> str:
    """Return the prefix of a group's request ids, distinct from every other group's."""
    return f"group{group_id}-"

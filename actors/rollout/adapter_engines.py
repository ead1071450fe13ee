"""Engines of a frozen base model that sample from many LoRA adapters at once, for clients with their own loops."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from ray.actor import ActorHandle

from actors.cluster.placement import Placement
from actors.cluster.waiting import CALL_LIMIT, within
from actors.roles.group import SpawnOne
from actors.rollout.adapter_shelf import AdapterShelf, ServedAdapter
from actors.rollout.client_samples import client_answer, refuse_unknown_tokens, sample_params
from actors.rollout.dispatch import GroupWork
from actors.rollout.engine_creation import RolloutEngine, spawn_engines
from actors.rollout.engine_group import RolloutEngines
from actors.rollout.vllm_engine import LORA_RANKS, RolloutSpec
from rlhf.adapters import MOST_TOP, SampleAnswer, SampleRequest
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.errors import RunError, UserError, WorkerLost
from rlhf.models.files.loading import load_model_config
from rlhf.process.suspects import CallLost, Suspects
from rlhf.roles import PolicyProbe
from rlhf.vision.reading import ImageFolder


class AdapterEngine(RolloutEngine):
    """An engine as a Ray actor, with up to `spec.max_adapters` adapters in memory."""

    def __init__(self, spec: RolloutSpec) -> None:
        super().__init__(spec)
        self.adapters = AdapterShelf(self.calls, room=spec.max_adapters, probed=self._probed)

    async def load_adapter(self, adapter: ServedAdapter) -> float:
        return await self.adapters.load(adapter)

    async def unload_adapter(self, number: int) -> None:
        await self.adapters.remove(number)

    async def sample(self, adapter: ServedAdapter | None, request: SampleRequest) -> SampleAnswer:
        """Draw the samples of a request in one batch."""
        kind = f"client{self._serial}-"
        async with nullcontext() if adapter is None else self.adapters.held(adapter) as lora:
            all_params = sample_params(request, self._added)
            samples = [self._submission(kind, request.token_ids, params, lora=lora) for params in all_params]
            futures = self.loop.submit(samples)
            try:
                outputs = await asyncio.gather(*[self.calls.wait(future, "a client's samples") for future in futures])
            except ValueError as error:  # vLLM has refused the request before its first step
                raise UserError(f"The request cannot be sampled: {error}") from error
            except RunError:
                self.loop.abort([kind])
                raise
        return client_answer(request, outputs)


class AdapterEngines(RolloutEngines):
    """The engines, whose adapters are known by name. See AdapterEnginesRole.

    A request goes to the engine with the least outstanding work, and brings a description of the adapter. An engine
    without the adapter in memory, such as the successor of a lost engine, reads and proves the adapter first.

    The log-probabilities of a sample are those of the sampling distribution: after temperature, top_k and top_p. At
    temperature 0 the log-probabilities are those of temperature 1. The log-probabilities of a prompt are at temperature
    1. The same request with a seed gives the same samples, unless rounding decides, which depends on the other requests
    of a step.
    """

    actor: type[AdapterEngine] = AdapterEngine
    transport: Literal["files"] | None = None  # None: the weights of the base model stay
    vocabulary: int  # number of the model's token ids

    def __init__(
        self, handles: Sequence[ActorHandle[Any]], spawn_one: SpawnOne | None = None, *, deadline_s: float
    ) -> None:
        super().__init__(handles, spawn_one, deadline_s=deadline_s)
        self.is_replaceable = self.gives_published = True
        self._adapters: dict[str, ServedAdapter | None] = {}  # None: being loaded
        self._users = Counter[int]()  # requests by the adapter's number
        self._left = asyncio.Event()  # a request has ended
        self._numbers, self._requests = itertools.count(1), itertools.count(1)
        self._suspects = Suspects()

    @classmethod
    def create(
        cls,
        model: str,
        cluster: ClusterConfig,
        placement: Placement,
        *,
        dtype: Literal["bfloat16", "float16", "float32"],
        max_length: int,
        rank: int | None,
        max_adapters: int,
        tokenizer: str | None = None,
        trust_remote_code: bool = False,
        images: ImageFolder | None = None,
    ) -> Self:
        """Create engines for clients of a base model, not started yet.

        Args:
            model: Hugging Face folder or name.
            max_length: most tokens of a prompt with a sample.
            rank: the largest rank of an adapter; None: there are no adapters.
            max_adapters: adapters that may have running samples at once in an engine. More can be loaded.
            tokenizer: folder or name; None: the model's own.
            images: of the prompts, for a model that sees.
        """
        if rank is not None and rank > LORA_RANKS[-1]:
            raise UserError(f"policy.lora.rank is {rank}, but engines take adapters up to rank {LORA_RANKS[-1]}.")
        vocabulary = load_model_config(model, trust_remote_code=trust_remote_code).get_text_config().vocab_size
        spec = RolloutSpec(
            model=model,
            tokenizer=tokenizer,
            dtype=dtype,
            max_model_len=max_length,
            transport=cls.transport,
            lora_rank=rank,
            max_adapters=max_adapters,
            top_logprobs=min(MOST_TOP, vocabulary),
            trust_remote_code=trust_remote_code,
            images=images,
        )
        engines = cls(*spawn_engines(spec, cluster, placement, cls.actor), deadline_s=cluster.call_timeout_s)
        engines.vocabulary = vocabulary
        return engines

    async def load(self, adapter: str, folder: Path, *, checksum: str, probe: PolicyProbe) -> float:
        """Load an exported adapter, whose folder must stay until `unload` has returned."""
        if adapter in self._adapters:
            raise UserError(f"An adapter named {adapter} is loaded already. Unload it first, or use another name.")
        served = ServedAdapter(name=adapter, number=next(self._numbers), folder=folder, checksum=checksum, probe=probe)
        self._adapters[adapter] = None
        try:
            found: dict[int, float] = {}
            while not found:
                await self.any_working()
                found = await self.present(lambda h: h.load_adapter.remote(served), "adapters")
            self._adapters[adapter] = served
        finally:
            if self._adapters[adapter] is None:
                del self._adapters[adapter]
        return max(found.values())

    async def unload(self, adapter: str) -> None:
        served = self._known(adapter)
        del self._adapters[adapter]
        while self._users[served.number]:
            self._left.clear()
            try:
                await within(self._left.wait(), self.deadline_s)
            except TimeoutError as error:
                late = f"no sample ended in {self.deadline_s:.0f} s ({CALL_LIMIT})"
                raise RunError(f"adapters: {adapter} still has running samples, and {late}") from error
        del self._users[served.number]
        await self.present(lambda h: h.unload_adapter.remote(served.number), "adapters")

    async def sample(self, adapter: str | None, request: SampleRequest) -> SampleAnswer:
        refuse_unknown_tokens(request, self.vocabulary)
        if adapter is None:
            return await self._sample(None, request)
        served = self._known(adapter)
        self._users[served.number] += 1
        try:
            return await self._sample(served, request)
        finally:
            self._users[served.number] -= 1
            self._left.set()

    async def _sample(self, adapter: ServedAdapter | None, request: SampleRequest) -> SampleAnswer:
        """Draw the samples. After the loss of an engine, draw them again with the same seeds.

        Requests that were lost with two engines are sampled singly, one after another. RunError: an engine was lost
        even so.
        """
        try:
            return await self._drawn(adapter, request, urgent=False)
        except CallLost as lost:
            first = lost.losses
        try:
            return await self._suspects.call(partial(self._drawn, adapter, request, urgent=True))
        except CallLost as lost:
            self._suspects.caused += first
            losses = first + lost.losses
            raise RunError(
                f"{len(losses)} engines were lost while they sampled this request. {losses[-1].reason}"
            ) from lost

    async def _drawn(self, adapter: ServedAdapter | None, request: SampleRequest, *, urgent: bool) -> SampleAnswer:
        """Sample a request in one engine. CallLost: the engine was lost, and is being replaced."""
        dispatch, key = await self._dispatching(), next(self._requests)
        work = GroupWork(prompt_tokens=len(request.token_ids), samples=request.num_samples, limit=request.max_tokens)
        slot = await dispatch.enter(key, work, urgent=urgent)
        assert slot is not None, "nothing drops a client's request"
        handle = self.handles[slot.engine]
        with self._at_work(key, slot, dispatch) as lengths:
            try:
                drawn: SampleAnswer = await self._answered(
                    handle.sample.remote(adapter, request), slot.engine, dispatch
                )
            except WorkerLost as lost:
                self.begin_rebuild(slot.engine, handle, lost)  # closes the engine before its place is released
                raise CallLost(self.last_loss.get(slot.engine, lost)) from lost
            lengths += [len(sequence.token_ids) for sequence in drawn.sequences]
        self._note_success(slot.engine)
        if self.supervisor is not None:  # the engines work: requests were the cause
            self.supervisor.forgive(self._suspects.take_caused())
        return drawn

    def _known(self, adapter: str) -> ServedAdapter:
        served = self._adapters.get(adapter)
        if served is None:
            raise UserError(f"No adapter named {adapter} is loaded. Load it first, or sample again from a loaded one.")
        return served

    async def _give_weights(self, rank: int) -> None:
        """Give a successor nothing: each request brings the description of its adapter."""

"""The rollout worker of a policy behind a server of the Tinker protocol. The server's engines draw the samples.

Everything else is as in a worker with an engine: the store of finished groups, conversations, and the proof of a sync.
The weights of a version are a sampling client of the path in the manifest. Samples in flight keep their version.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from actors.rollout.dispatch import EngineCapacity
from actors.rollout.engine_actor import RolloutSpec
from actors.rollout.engine_calls import EngineCalls
from actors.rollout.engine_creation import RolloutEngine
from actors.rollout.engine_thread import Aborted, EngineLoop, Submission
from actors.rollout.engine_weights import EngineWeights, SyncReceipt
from actors.rollout.held_requests import HeldRequests
from actors.weights import WeightManifest
from rlhf.deferred import transformers
from rlhf.engine.tinker_client import TinkerClient, TinkerEndpoint
from rlhf.errors import RESUMES, RunError
from rlhf.models.files.loading import load_tokenizer, split_revision
from rlhf.types import Sampling

T = TypeVar("T")
SAMPLES_AT_ONCE = 1024  # limit of one run; the server divides the samples among its engines


class TinkerLoop(EngineLoop):
    """Sends samples to the server in place of an engine. No thread is needed, because the client has a thread."""

    def __init__(self, server: TinkerEndpoint, *, run: str, name: str, limit_s: float) -> None:
        super().__init__(_no_engine, name=name)
        self._open = partial(TinkerClient, server, run=run, limit_s=limit_s)
        self.client: TinkerClient
        self.sampler: Any = None  # sampler of the newest version
        self.version = -1
        self._asked: dict[str, Future[Any]] = {}  # the client's futures, by request id

    def connect(self) -> None:
        """Open a session at the server."""
        self.client = self._open()

    def call(self, work: Callable[[Any], T]) -> Future[T]:
        raise RunError(
            f"{self.name}: the engines belong to the server of policy.tinker, and accept only requests for samples."
        )

    def submit(self, submissions: Sequence[Submission]) -> list[Future[Any]]:
        """Ask for all samples. Each future gives an output of the fields that a worker reads of vLLM's.

        Samples of a prompt with consecutive seeds are asked for in one request, because a request costs the run and
        the server milliseconds.
        """
        if any(min(sample.prompt_token_ids) < 0 for sample in submissions):
            raise RunError(f"{self.name}: a prompt has an image, and the run sends only text to the server")
        together: list[list[Submission]] = []
        for sample in submissions:
            if together and _continues(together[-1], sample):
                together[-1].append(sample)
            else:
                together.append([sample])
        return [future for samples in together for future in self._submit(samples)]

    def _submit(self, samples: Sequence[Submission]) -> list[Future[Any]]:
        futures: list[Future[Any]] = [Future() for _ in samples]
        prompt = self.client.types.ModelInput.from_ints(list(samples[0].prompt_token_ids))
        asked = self.sampler.sample(prompt, len(samples), samples[0].params).future()
        names = [sample.request_id for sample in samples]
        self._waiting.update(zip(names, futures, strict=True))
        self._asked.update(dict.fromkeys(names, asked))
        asked.add_done_callback(partial(self._finish, names, futures, self.version))
        return futures

    def _finish(self, names: Sequence[str], futures: Sequence[Future[Any]], version: int, asked: Future[Any]) -> None:
        self.last_step = time.monotonic()
        for place, (name, given) in enumerate(zip(names, futures, strict=True)):
            self._waiting.pop(name, None)
            self._asked.pop(name, None)
            if not given.set_running_or_notify_cancel():  # the waiting caller gave up
                continue
            if asked.cancelled():
                given.set_exception(Aborted(f"{self.name}: aborted"))
            elif (error := asked.exception()) is not None:
                given.set_exception(RunError(f"policy.tinker: {self.name}: a sample failed: {error} {RESUMES}"))
            else:
                given.set_result(_output(asked.result().sequences[place], version))

    def abort(self, prefixes: Sequence[str], *, keeps: bool = False) -> Future[int]:
        """Cancel the requests with an id that begins with a given prefix. Return their number."""
        dropped = [asked for name, asked in list(self._asked.items()) if name.startswith(tuple(prefixes))]
        for asked in dropped:
            asked.cancel()
        count: Future[int] = Future()
        count.set_result(len(dropped))
        return count

    def stop(self, *, timeout_s: float) -> bool:
        self.abort([""])
        self.client.close()
        return True


class TinkerWeights(EngineWeights):
    """The version of the sampling client. The proof of a sync compares log-probabilities with the policy's."""

    def __init__(self, spec: RolloutSpec, calls: EngineCalls, loop: TinkerLoop) -> None:
        super().__init__(spec, calls)
        self._loop = loop

    async def _load(self, manifest: WeightManifest) -> SyncReceipt:
        self.version, client, path = None, self._loop.client, manifest.fields["path"]
        future = client.service.create_sampling_client(model_path=path)
        self._loop.sampler = await asyncio.to_thread(client.wait, future, f"the sampling client of {path}")
        self._loop.version = self.version = manifest.version
        self.checksum = manifest.checksum
        return SyncReceipt(version=manifest.version, checksum=self.checksum)


class TinkerRolloutEngine(RolloutEngine):
    """A rollout worker that holds no engine, because the server samples."""

    def __init__(self, spec: RolloutSpec) -> None:
        super().__init__(spec)
        assert spec.server is not None
        limit_s = spec.call_timeout_s / 2  # so that this process reports the delay before the driver does
        name = f"{spec.name} at {spec.server.url}"
        loop = TinkerLoop(spec.server, run=spec.name, name=name, limit_s=limit_s)
        self.loop = self.client_loop = loop
        self.calls = EngineCalls(loop, deadline_s=limit_s)
        self.held, self.weights = HeldRequests(self.calls), TinkerWeights(spec, self.calls, loop)

    async def open(self) -> None:
        await asyncio.to_thread(self.client_loop.connect)
        spec = self.spec
        tokenizer = load_tokenizer(spec.tokenizer or spec.model, trust_remote_code=spec.trust_remote_code)
        self._added = dict(tokenizer.get_added_vocab())
        self._ends = _end_tokens(spec.model) | ({tokenizer.eos_token_id} - {None})

    async def end_tokens(self) -> frozenset[int]:
        return self._ends

    def params(self, sampling: Sampling, seed: int, turn_end: int | None) -> Any:
        """Return the protocol's parameters. All end tokens are named, since named stops replace the model's."""
        ends = {*self._ends, *sampling.stop_token_ids, turn_end} - {None}
        return self.client_loop.client.types.SamplingParams(
            max_tokens=sampling.max_new_tokens,
            seed=seed,
            stop=sorted(token for token in ends if token is not None),
            temperature=sampling.temperature,
            top_k=-1 if sampling.top_k is None else sampling.top_k,
            top_p=sampling.top_p,
        )

    async def _probed(self, token_ids: Sequence[int], lora: Any) -> list[float]:
        client = self.client_loop.client
        future = self.client_loop.sampler.compute_logprobs(client.types.ModelInput.from_ints(list(token_ids)))
        logprobs: Sequence[float] = await asyncio.to_thread(client.wait, future, "the probe")
        return [float(value) for value in logprobs[1:]]

    async def capacity(self) -> EngineCapacity:
        environment = self.spec.environment
        samples = SAMPLES_AT_ONCE if environment is None else environment.processes
        return EngineCapacity(cache_tokens=SAMPLES_AT_ONCE * self.spec.max_model_len, samples=samples)

    async def _do_nothing(self) -> None:
        """The server has the prefixes of its own weights, and its own GPUs. Nothing of the server is profiled."""

    forget_prefixes = start_profile = gpu_peak_gib = _do_nothing

    async def stop_profile(self, path: Path) -> None:
        """Do nothing: there is no profile."""


def _no_engine() -> Any:
    raise RunError("This worker has no engine, because the server of policy.tinker samples.")


def _continues(samples: Sequence[Submission], sample: Submission) -> bool:
    """Return whether a sample is the next of a request: the same prompt and parameters, and the next seed."""
    first, seed = samples[0], samples[0].params.seed + len(samples)
    return sample.prompt_token_ids == first.prompt_token_ids and sample.params == first.params.model_copy(
        update={"seed": seed}
    )


def _output(sequence: Any, version: int) -> Any:
    """Return a sample in the fields of vLLM's output, as read by actors.rollout.continuation."""
    tokens, logprobs = list(sequence.tokens), [float(value) for value in sequence.logprobs]
    sample = SimpleNamespace(
        token_ids=tokens,
        logprobs=SimpleNamespace(logprobs=logprobs, start_indices=range(len(logprobs))),
        weight_versions=[SimpleNamespace(version=version, start=0, end=len(tokens))],
        finish_reason=sequence.stop_reason,
        routed_experts=None,
    )
    return SimpleNamespace(outputs=[sample])


def _end_tokens(model: str) -> frozenset[int]:
    """Return the end tokens of a model's generation config, if it has one."""
    name, revision = split_revision(model)
    options: Mapping[str, Any] = {} if revision is None else {"revision": revision}
    try:
        given = transformers.GenerationConfig.from_pretrained(name, **options).eos_token_id
    except OSError:
        return frozenset()
    return frozenset([given] if isinstance(given, int) else given or ())

"""An engine loop without a model, for the front: a function gives the answers at once."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from actors.rollout.engine_actor import RolloutSpec, engine_environment
from actors.rollout.engine_thread import Aborted, Submission
from actors.rollout.image_inputs import ImageInputs
from actors.serving.captured_sessions import CapturedSessions
from actors.serving.front import Front, FrontSpec, build_front
from actors.serving.front_engine import EngineParts, FrontEngine
from rlhf.errors import RunError

Says = Callable[[Sequence[int], Any], list[int]]


class DummyLoop:
    """Samples the tokens of `says` for a prompt and the parameters. The last token may end the turn.

    `chunk`: tokens per output of a stream. `hold`: answer nothing until `abort` drops the request.
    """

    def __init__(self, tokenizer: Any, says: Says, *, chunk: int = 3) -> None:
        self.tokenizer = tokenizer
        self.says = says
        self.chunk = chunk
        self.hold = False
        self.end: str | None = None  # finish reason of every response; None: by its last token
        self.version = 0
        self.first_version: int | None = None  # finish reason of the first token; None: the same
        self.on_step: Callable[[Sequence[Any]], None] | None = None
        self.failure: RunError | None = None
        self.asked: list[Submission] = []
        self.waiting: dict[str, Future[Any]] = {}

    def submit(self, submissions: Sequence[Submission]) -> list[Future[Any]]:
        self.asked += submissions
        futures: list[Future[Any]] = [Future() for _ in submissions]
        for submission, future in zip(submissions, futures, strict=True):
            if self.failure is not None:
                future.set_exception(self.failure)
            elif self.hold:
                self.waiting[submission.request_id] = future
            else:
                self._answer(submission, future)
        return futures

    def abort(self, prefixes: Sequence[str]) -> Future[int]:
        dropped = [name for name in self.waiting if name.startswith(tuple(prefixes))]
        for name in dropped:
            self.waiting.pop(name).set_exception(Aborted("aborted"))
        done: Future[int] = Future()
        done.set_result(len(dropped))
        return done

    def _answer(self, submission: Submission, future: Future[Any]) -> None:
        from vllm.outputs import CompletionOutput, RequestOutput, WeightVersionSpan
        from vllm.sampling_params import RequestOutputKind

        assert self.on_step is not None
        params, parts = submission.params, []
        streams = params.output_kind == RequestOutputKind.DELTA and params.n == 1
        for index in range(params.n):
            ids = self.says(submission.prompt_token_ids, params)[: params.max_tokens]
            ends = bool(ids) and ids[-1] in (*params.stop_token_ids, self.tokenizer.eos_token_id)
            text = self.tokenizer.decode(ids[:-1] if ends else ids, skip_special_tokens=True)
            stop = next((stop for stop in params.stop if stop in text), None)
            text, shown = text.partition(stop)[0] if stop else text, 0
            first = self.version if self.first_version is None else self.first_version
            spans = [WeightVersionSpan(str(first), 0, 1), WeightVersionSpan(str(self.version), 1, len(ids))]
            for begin, end in itertools.pairwise(
                [*range(0, len(ids), self.chunk if streams else len(ids) or 1), len(ids)]
            ):
                is_last = end == len(ids)
                until = len(text) if is_last else len(self.tokenizer.decode(ids[:end], skip_special_tokens=True))
                part = CompletionOutput(
                    index=index,
                    text=text[shown:until],
                    token_ids=ids[begin:end],
                    cumulative_logprob=None,
                    logprobs=_logprobs(ids[begin:end], begin, params),
                    finish_reason=(self.end or ("stop" if ends or stop else "length")) if is_last else None,
                    stop_reason=stop if is_last else None,
                    weight_versions=spans if is_last else None,
                )
                shown = until
                parts.append(part)
        for step in [[part] for part in parts] if streams else [parts]:
            prompt_ids = list(submission.prompt_token_ids)
            output = RequestOutput(submission.request_id, None, prompt_ids, None, step, step[-1] is parts[-1])
            self.on_step([output])
        future.set_result(output)


def _logprobs(ids: Sequence[int], begin: int, params: Any) -> Any:
    """Return log-probabilities of -0.5, -1.5, ... by the place of the token."""
    from vllm.logprobs import FlatLogprobs, Logprob

    if params.logprobs is None:
        return None
    flat = FlatLogprobs()
    for place, token in enumerate(ids, start=begin):
        flat.append({token: Logprob(logprob=-0.5 - place, rank=1, decoded_token=chr(token) if token < 128 else "")})
    return flat if params.flat_logprobs else [flat[place] for place in range(len(flat))]


def dummy_parts(model: Path, max_model_len: int = 1024) -> EngineParts:
    """Return the parts of an engine for a model folder, without loaded weights."""
    lengths: dict[str, Any] = {"dtype": "float32", "max_model_len": max_model_len}
    os.environ |= engine_environment(RolloutSpec(model=str(model), transport=None, **lengths))
    from vllm import EngineArgs
    from vllm.renderers import renderer_from_config
    from vllm.v1.engine.input_processor import InputProcessor

    arguments = EngineArgs(model=str(model), enforce_eager=True, mm_processor_cache_gb=0, **lengths)
    config = arguments.create_engine_config()
    renderer = renderer_from_config(config)
    return EngineParts(
        vllm_config=config,
        renderer=renderer,
        input_processor=InputProcessor(config, renderer),
        added=dict(renderer.get_tokenizer().get_added_vocab()),
        ends=frozenset({renderer.get_eos_token_id()}),
    )


async def open_front(loop: DummyLoop, parts: EngineParts, spec: FrontSpec, images: ImageInputs | None = None) -> Front:
    """Start a front over a dummy engine. images: of requests, for a model that sees."""
    engine = FrontEngine(loop, parts, ends=spec.turn_ends, lora=lambda: None)
    sessions = CapturedSessions(lambda prefix: loop.abort([prefix]), takes_images=images is not None)
    return await Front.serve(await build_front(engine, sessions, spec, images), host="127.0.0.1")

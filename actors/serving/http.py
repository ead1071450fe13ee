"""`rlhf serve`: a model behind rollout engines, with OpenAI's interface.

    GET  /health                {"status": "ok"}, or 503 with the reason once all engines are dead
    GET  /v1/models             the only model, with the name for requests
    POST /v1/chat/completions   a conversation
    POST /v1/completions        prompts without a template

Without a token it serves this machine alone. It does not stream: an answer is sent whole.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import secrets
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from aiohttp import web

from actors.cluster.connect import OWN_RAY
from actors.serving.offline import serving
from actors.serving.openai_schema import (
    LEAST_LOGPROB,
    Answer,
    Answered,
    ChatRequest,
    Refused,
    TextRequest,
    answer_body,
    read,
)
from actors.serving.router import NoEngine, RequestRouter
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.data.chat import raw_prompt, render, turn_end
from rlhf.data.prompts import rollout_seed
from rlhf.data.sources import refuse_half_characters
from rlhf.data.tokenization import encode, encode_raw, raw_beginning
from rlhf.errors import RunError, UserError
from rlhf.models.on_disk import ModelOnDisk
from rlhf.rollouts.records.spans import Sampled
from rlhf.rollouts.records.texts import text_before_stop, token_texts, without_turn_end
from rlhf.serving import END_WITHIN_S, gives_token, read_text, serve_until_interrupted, stranger
from rlhf.types import Prompt, Sampling

logger = logging.getLogger(__name__)
A = TypeVar("A", ChatRequest, TextRequest)

MAX_BODY_BYTES = 16 * 2**20
MAX_WAITING = 1024  # unanswered requests; more are refused with 429
LONG_TEXT = 100_000  # characters; tokenizing a longer request takes a noticeable part of a second
LAST_S = END_WITHIN_S - 1.0  # for running requests when the server gets a signal
THERE_IS = "there are GET /health, GET /v1/models, POST /v1/chat/completions and POST /v1/completions"


class Engines(Protocol):
    """The interface of the engines behind the server."""

    async def answer(self, prompt: Prompt, seeds: Sequence[int], sampling: Sampling) -> list[Sampled]:
        """Return one response for each seed. NoEngine: all engines are dead."""

    async def trouble(self) -> str | None:
        """Return the reason why nothing answers any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """The settings of a server and its model."""

    name: str  # the value of `model` in requests
    max_length: int  # tokens of prompt and response
    deadline_s: float  # from a request to its answer
    token: str | None  # None: no token is needed


class ModelServer:
    """The web application in front of the engines."""

    def __init__(self, engines: Engines, tokenizer: Any, spec: ServerSpec) -> None:
        self.engines = engines
        self.tokenizer = tokenizer
        self.spec = spec
        self.limits: set[asyncio.Timeout] = set()  # of the unanswered requests
        self.is_ending = False
        self.created = int(time.time())
        self.beginning = raw_beginning(tokenizer)
        self.turn_end = turn_end(tokenizer)
        self.texts = ThreadPoolExecutor(1)  # tokenizes and decodes, so that the event loop never waits for it
        self.long_texts = ThreadPoolExecutor(1)  # tokenizes long prompts with a separate tokenizer
        self.long_tokenizer = copy.deepcopy(tokenizer)
        self.most_characters = spec.max_length * max((len(token) for token in tokenizer.get_vocab()), default=1)

    def application(self) -> web.Application:
        """Build the aiohttp application and its routes."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._guard])
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._text)
        app.on_shutdown.append(self._end)
        return app

    async def _end(self, application: web.Application) -> None:
        """Give running requests a last moment, then fail them."""
        self.is_ending = True
        last = asyncio.get_running_loop().time() + LAST_S
        for limit in self.limits:
            if not limit.expired():
                limit.reschedule(min(limit.when() or last, last))

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Check the token, and return errors in OpenAI's form."""
        try:
            self._check_access(request)
            return await handler(request)
        except Refused as error:
            refused = error
        except UserError as error:  # raised while a conversation becomes a prompt
            refused = Refused(str(error))
        except NoEngine as error:
            refused = Refused(str(error), status=503)
        except RunError as error:
            logger.error("%s", error)
            refused = Refused(str(error), status=500)
        except web.HTTPRequestEntityTooLarge:
            refused = Refused(f"the body has more than {MAX_BODY_BYTES} bytes", status=413)
        except web.HTTPException as error:
            refused = Refused(f"{error.reason}: {THERE_IS}", status=error.status)
        return web.json_response(refused.body(), status=refused.status)

    def _check_access(self, request: web.Request) -> None:
        if self.spec.token is None:
            why = stranger(request)
            if why is not None:
                raise Refused(why, status=403)
        elif request.path != "/health" and not gives_token(request, self.spec.token):
            why = "give the token as `Authorization: Bearer TOKEN`, which is what clients do with an API key"
            raise Refused(why, code="invalid_api_key", status=401)

    async def _health(self, request: web.Request) -> web.Response:
        why = await self.engines.trouble()
        if why is not None:
            raise Refused(why, status=503)
        return web.json_response({"status": "ok"})

    async def _models(self, request: web.Request) -> web.Response:
        model = {"id": self.spec.name, "object": "model", "created": self.created, "owned_by": "rlhf"}
        return web.json_response({"object": "list", "data": [{**model, "max_model_len": self.spec.max_length}]})

    async def _chat(self, request: web.Request) -> web.Response:
        return await self._complete(await _body(request, ChatRequest), self._of_conversation)

    async def _text(self, request: web.Request) -> web.Response:
        return await self._complete(await _body(request, TextRequest), self._of_texts)

    async def _complete(self, asked: A, to_prompts: Callable[[A, Any], list[Prompt]]) -> web.Response:
        """Answer a request for this model before its deadline, unless too many already wait."""
        if asked.model != self.spec.name:
            message = f"there is no model {asked.model}: this server has {self.spec.name}"
            raise Refused(message, param="model", code="model_not_found", status=404)
        if len(self.limits) >= MAX_WAITING:
            raise Refused(f"{MAX_WAITING} requests are waiting already", status=429)
        try:
            async with asyncio.timeout(LAST_S if self.is_ending else self.spec.deadline_s) as limit:
                self.limits.add(limit)
                try:
                    answered = await self._answer_all(asked, await self._tokenized(asked, to_prompts))
                finally:
                    self.limits.remove(limit)
        except TimeoutError as error:
            if self.is_ending:
                raise Refused("the server was told to end", status=503) from error
            raise Refused(f"not answered within {self.spec.deadline_s:g} s (--deadline-s)", status=504) from error
        return web.json_response(answer_body(asked, answered, name=secrets.token_hex(12), created=int(time.time())))

    async def _answer_all(self, asked: ChatRequest | TextRequest, prompts: Sequence[Prompt]) -> list[Answered]:
        """Return the responses to all prompts. The first failure ends the request."""
        seed = secrets.randbelow(2**63) if asked.seed is None else asked.seed
        tasks = [asyncio.ensure_future(self._answered(prompt, asked, seed=seed)) for prompt in prompts]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _answered(self, prompt: Prompt, asked: ChatRequest | TextRequest, *, seed: int) -> Answered:
        """Return the responses to one prompt."""
        num_tokens, whole, limit = len(prompt.token_ids), self.spec.max_length, asked.limit
        if num_tokens + (limit or 1) > whole:
            raise Refused(
                f"the prompt has {num_tokens} tokens, with {limit or 1} new ones that is more than the {whole} that "
                "this server takes (--max-length)",
                code="context_length_exceeded",
            )
        seeds = [rollout_seed(seed, 0, prompt.prompt_id, sample) for sample in range(asked.n)]
        drawn = await self.engines.answer(prompt, seeds, asked.sampling(limit or whole - num_tokens))
        answers = await asyncio.get_running_loop().run_in_executor(
            self.texts, lambda: [self._to_answer(response, prompt, asked) for response in drawn]
        )
        return Answered(num_prompt_tokens=num_tokens, answers=tuple(answers))

    def _to_answer(self, response: Sampled, prompt: Prompt, asked: ChatRequest | TextRequest) -> Answer:
        """Return a response as text, without the special tokens at its end and without the stop string."""
        ids = list(response.token_ids)
        text = text_before_stop(without_turn_end(ids, prompt.turn_end), asked.stop, self.tokenizer)
        tokens: list[tuple[str, float]] = []
        if asked.wants_tokens:
            special, length = set(self.tokenizer.all_special_ids), 0
            for token, token_text, logprob in zip(
                ids, token_texts(ids, self.tokenizer), response.logprobs, strict=True
            ):
                if token in special or token == prompt.turn_end or length >= len(text):
                    continue
                tokens.append((token_text, max(logprob, LEAST_LOGPROB)))
                length += len(token_text)
        return Answer(text=text, finish_reason=response.finish_reason, tokens=tuple(tokens), num_tokens=len(ids))

    def _of_conversation(self, asked: ChatRequest, tokenizer: Any) -> list[Prompt]:
        if tokenizer.chat_template is None:
            raise Refused(f"{self.spec.name} has no chat template, which conversations need; use POST /v1/completions")
        for index, message in enumerate(asked.messages):
            refuse_half_characters(message.content, f"`messages[{index}].content`")
        messages = [{"role": message.role, "content": message.content} for message in asked.messages]
        text = render(messages, tokenizer, add_generation_prompt=True, place="`messages`")
        (prompt,) = self._prompts([text], encode([text], tokenizer))
        return [replace(prompt, is_chat=True, turn_end=self.turn_end)]

    def _of_texts(self, asked: TextRequest, tokenizer: Any) -> list[Prompt]:
        for index, text in enumerate(asked.prompt):
            refuse_half_characters(text, f"`prompt[{index}]`")
        options: dict[str, Any] = {"place": "`prompt`", "system_prompt": None, "beginning": self.beginning}
        texts = [raw_prompt(text, **options) for text in asked.prompt]
        return self._prompts(texts, encode_raw(texts, tokenizer))

    def _prompts(self, texts: Sequence[str], encoded: Sequence[list[int]]) -> list[Prompt]:
        if not all(encoded):
            raise Refused(f"the prompt {texts[list(encoded).index([])]!r:.40} has no tokens", param="prompt")
        return [
            Prompt(prompt_id=place, token_ids=tuple(token_ids), text=text, columns={})
            for place, (text, token_ids) in enumerate(zip(texts, encoded, strict=True))
        ]

    async def _tokenized(self, asked: A, to_prompts: Callable[[A, Any], list[Prompt]]) -> list[Prompt]:
        """Tokenize a request. A long one is refused by its number of characters, or waits only for other long ones."""
        texts = asked.texts
        longest = max(map(len, texts))
        if longest > self.most_characters:
            raise Refused(
                f"the prompt has {longest} characters. The {self.spec.max_length} tokens that this server takes "
                f"(--max-length) hold at most {self.most_characters}",
                code="context_length_exceeded",
            )
        loop = asyncio.get_running_loop()
        if sum(map(len, texts)) > LONG_TEXT:
            return await loop.run_in_executor(self.long_texts, to_prompts, asked, self.long_tokenizer)
        return await loop.run_in_executor(self.texts, to_prompts, asked, self.tokenizer)


async def _body(request: web.Request, form: type[A]) -> A:
    try:
        return read(await read_text(request), form)
    except ValueError as error:
        raise Refused(str(error)) from error


def serve_model(
    model: ModelOnDisk,
    tokenizer: Any,
    spec: ServerSpec,
    cluster: ClusterConfig,
    *,
    host: str,
    port: int,
    ready: Callable[[str], None],
) -> None:
    """Serve a model until interrupted. `ready` is called with the address, the base URL for clients."""
    with suppress(_Terminated), serving(model, tokenizer, cluster, max_model_len=spec.max_length) as served:
        server = ModelServer(RequestRouter(served.engines.handles, deadline_s=cluster.call_timeout_s), tokenizer, spec)
        try:
            signal_received = serve_until_interrupted(
                server.application(),
                host=host,
                port=port,
                ready=lambda address: ready(f"{address}/v1"),
                drops_abandoned=True,
            )
        finally:
            for executor in (server.texts, server.long_texts):
                executor.shutdown(wait=False, cancel_futures=True)
        if signal_received is signal.SIGTERM and OWN_RAY.daemons:
            OWN_RAY.kill()  # it may have got the signal too, and a Ray that ends does not answer
            raise _Terminated


class _Terminated(Exception):
    """Raised by SIGTERM to end a server that started its Ray."""

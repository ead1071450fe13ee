"""`rlhf serve`: a model behind rollout engines, with the interfaces of OpenAI and Anthropic.

    GET  /health                      {"status": "ok"}, or 503 with the reason once all engines are dead
    GET  /v1/models                   the only model, with the name for requests
    POST /v1/chat/completions         a conversation
    POST /v1/completions              prompts without a template
    POST /v1/responses                a conversation, in the form of OpenAI's newer interface
    POST /v1/messages                 a conversation, in Anthropic's form; and /v1/messages/count_tokens

This process checks access, limits the requests in flight, and passes each request to the front of an engine. Without a
token, only this machine is served.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import signal
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

from aiohttp import ClientError, web

from actors.cluster.connect import OWN_RAY
from actors.serving.front import FrontSpec
from actors.serving.offline import serving
from actors.serving.refusals import THERE_IS, RefusedCall
from actors.serving.router import NoEngine, RequestRouter
from rlhf.agents.limits import MAX_REQUEST_BYTES
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.data.chat import turn_end
from rlhf.errors import RunError
from rlhf.models.on_disk import ModelOnDisk
from rlhf.process.owned_folders import temporary_folder
from rlhf.serving import END_WITHIN_S, BadBody, gives_token, read_body, serve_until_interrupted, stranger
from rlhf.vision.processor import ImageProcessing
from rlhf.vision.reading import ImageFolder, ImageLimits

logger = logging.getLogger(__name__)

MAX_WAITING = 1024  # unanswered requests; more are refused with 429
IMAGES_KEPT_S = 3600.0  # of requests, much longer than a request waits for the engine
LAST_S = END_WITHIN_S - 1.0  # for running requests when the server gets a signal


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """The settings of a server and the served model."""

    name: str  # the value of `model` in requests
    max_length: int  # tokens of prompt and response
    deadline_s: float  # from a request to its answer
    token: str | None  # None: no token is needed
    tool_parser: str | None = None  # vLLM's name; None: chosen by the model
    reasoning_parser: str | None = None  # the same
    image_hosts: tuple[str, ...] = ()  # from which images of requests are fetched by https


class ModelServer:
    """The web application in front of the engines. `key` opens their fronts."""

    def __init__(self, engines: RequestRouter, spec: ServerSpec, key: str) -> None:
        self.engines = engines
        self.spec = spec
        self.key = key
        self.limits: set[asyncio.Timeout] = set()  # of the unanswered requests
        self.is_ending = False

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_REQUEST_BYTES, middlewares=[self._guard])
        app.router.add_get("/health", self._health)
        app.router.add_route("*", "/{path:.*}", self._pass_on)
        app.on_shutdown.append(self._end)
        app.on_cleanup.append(lambda _: self.engines.close())
        return app

    async def _end(self, application: web.Application) -> None:
        """Give running requests a last moment, then fail the rest."""
        self.is_ending = True
        last = asyncio.get_running_loop().time() + LAST_S
        for limit in self.limits:
            if not limit.expired():
                limit.reschedule(min(limit.when() or last, last))

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Check the token, and return errors in the form of the path's protocol."""
        try:
            self._check_access(request)
            return await handler(request)
        except RefusedCall as error:
            refused = error
        except BadBody as error:
            refused = RefusedCall(str(error), status=error.status)
        except NoEngine as error:
            refused = RefusedCall(str(error), status=503)
        except RunError as error:
            logger.error("%s", error)
            refused = RefusedCall(str(error), status=500)
        except web.HTTPRequestEntityTooLarge:
            refused = RefusedCall(f"the body has more than {MAX_REQUEST_BYTES} bytes", status=413)
        except web.HTTPException as error:
            refused = RefusedCall(f"{error.reason}: {THERE_IS}", status=error.status)
        return web.json_response(refused.body(request.path), status=refused.status)

    def _check_access(self, request: web.Request) -> None:
        if self.spec.token is None:
            if (why := stranger(request)) is not None:
                raise RefusedCall(why, status=403)
        elif request.path != "/health" and not gives_token(request, self.spec.token):
            why = "give the token as the API key of the client: `Authorization: Bearer TOKEN` or `x-api-key: TOKEN`"
            raise RefusedCall(why, code="invalid_api_key", status=401)

    async def _health(self, request: web.Request) -> web.Response:
        if (why := await self.engines.trouble()) is not None:
            raise RefusedCall(why, status=503)
        return web.json_response({"status": "ok"})

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        """Let an engine answer a request before the deadline, unless too many requests already wait."""
        if len(self.limits) >= MAX_WAITING:
            raise RefusedCall(f"{MAX_WAITING} requests are waiting already", status=429)
        body = await read_body(request)
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": request.headers.get("Content-Type", "")}
        response: web.StreamResponse | None = None
        try:
            async with asyncio.timeout(LAST_S if self.is_ending else self.spec.deadline_s) as limit:
                self.limits.add(limit)
                try:
                    async with self.engines.ask(request.method, request.path, headers=headers, body=body) as answer:
                        content = {"Content-Type": answer.headers.get("Content-Type", "application/json")}
                        if answer.content_type != "text/event-stream":
                            return web.Response(status=answer.status, body=await answer.read(), headers=content)
                        response = web.StreamResponse(status=answer.status, headers=content)
                        await response.prepare(request)
                        async for chunk in answer.content.iter_any():
                            await response.write(chunk)
                finally:
                    self.limits.remove(limit)
        except (TimeoutError, ClientError) as error:
            refused = self._failed(error)
            if response is None:
                raise refused from error
            if request.transport is not None and request.transport.get_write_buffer_size():
                request.transport.abort()  # the client has stopped reading, and would keep the connection open
                return response
            await response.write(f"event: error\ndata: {json.dumps(refused.body(request.path))}\n\n".encode())
        await response.write_eof()
        return response

    def _failed(self, error: TimeoutError | ClientError) -> RefusedCall:
        if isinstance(error, ClientError):
            return RefusedCall(f"the engine broke off its answer: {error}", status=503)
        if self.is_ending:
            return RefusedCall("the server was told to end", status=503)
        return RefusedCall(f"not answered within {self.spec.deadline_s:g} s (--deadline-s)", status=504)


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
    with ExitStack() as stack:
        stack.enter_context(suppress(_Terminated))
        folder = stack.enter_context(temporary_folder())
        sees = ImageProcessing.of_model(model.base) is not None
        images = (
            ImageFolder(folder=folder, limits=ImageLimits(hosts=spec.image_hosts), kept_s=IMAGES_KEPT_S)
            if sees
            else None
        )
        served = stack.enter_context(serving(model, tokenizer, cluster, max_model_len=spec.max_length, images=images))
        key, end = secrets.token_urlsafe(32), turn_end(tokenizer)
        front = FrontSpec(
            name=spec.name,
            template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
            turn_ends=() if end is None else (end,),
            tool_parser=spec.tool_parser,
            reasoning_parser=spec.reasoning_parser,
            own_key=key,
        )
        urls = served.open_fronts(front)
        server = ModelServer(RequestRouter(served.engines.handles, urls), spec, key)
        signal_received = serve_until_interrupted(
            server.application(),
            host=host,
            port=port,
            ready=lambda address: ready(f"{address}/v1"),
            drops_abandoned=True,
        )
        if signal_received is signal.SIGTERM and OWN_RAY.daemons:
            OWN_RAY.kill()  # Ray may have got the signal too, and does not answer while ending
            raise _Terminated


class _Terminated(Exception):
    """Raised by SIGTERM to end a server with a local Ray."""

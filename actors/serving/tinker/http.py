"""The routes of `rlhf tinker`, below /api/v1, and /metrics for Prometheus.

The routes read bodies, check keys, and turn errors into the statuses of the protocol. After 400 to 404 the client ends
the call, after 408, 429 and 5xx the client tries again, and 410 means a lost session or result.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from urllib.parse import quote

from aiohttp import web

from rlhf.deferred import DeferredModule
from rlhf.errors import RunError, StorageFull, UserError
from rlhf.hosting import bodies
from rlhf.hosting.checkpoints import Checkpoint, expiry
from rlhf.hosting.refusals import Forgotten, Gone, NotFound, TooMany
from rlhf.hosting.request_line import Result
from rlhf.hosting.service import TinkerService
from rlhf.serving import BadBody, is_same_secret, read_body, stranger

zstandard = DeferredModule("zstandard")
logger = logging.getLogger(__name__)
API = "/api/v1"
MOST_BODY = 1 << 28  # of rows and of prompts
SMALL_BODY = 1 << 24  # of the other calls, whose bodies are read in the event loop
URL_S = 3600  # validity of the URL of a checkpoint's file
PROTOBUF = "application/x-protobuf"
MOST_LISTED = 1000
OWNER = web.RequestKey("owner", str)  # name for the key of a request
CLIENT_CONFIG = {
    "pjwt_auth_enabled": False,
    "parallel_fwdbwd_chunks": True,
    "proto_compress_fwdbwd": True,
    "use_pyqwest_transport": False,
    "sample_use_retrieve_futures": True,
    "sample_join_sampling_session": True,
    "custom_loss_server_side": False,
}
DYNAMIC_CONFIG = {"refresh_interval_sec": 300, "sample_cancel_enabled": True}
UNSUPPORTED = {
    "create_custom_loss": "custom losses run in the client (forward_backward_custom)",
    "copy_weights": "checkpoints are not copied between projects",
    "unload_model": "a finished session frees its models",
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Call = Callable[..., Any]  # of the service, with a name for the caller's key, the parts of the path, and the body


class TinkerServer:
    """The web application. `opened` is entered in the application's event loop, before the first request.

    keys: open the server; empty: the server answers every caller on this machine.
    """

    service: TinkerService

    def __init__(self, opened: AbstractAsyncContextManager[TinkerService], keys: Sequence[str]) -> None:
        self._opened, self._keys = opened, tuple(keys)
        self._secret = secrets.token_bytes(32)

    async def _open(self, application: web.Application) -> AsyncIterator[None]:
        async with self._opened as self.service:
            yield

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MOST_BODY, middlewares=[self._guard])
        app.cleanup_ctx.append(self._open)
        get, post = partial(self._get, app), partial(self._post, app)
        app.router.add_get("/metrics", self._metrics)
        get("healthz", lambda service, owner: {"status": "ok"})
        get("get_server_capabilities", _capabilities)
        post("client/config", lambda service, owner, body: CLIENT_CONFIG)
        post("client/dynamic_config", lambda service, owner, body: DYNAMIC_CONFIG)
        post("telemetry", lambda service, owner, body: {"status": "accepted"})
        post("create_session", TinkerService.create_session)
        post("session_heartbeat", TinkerService.heartbeat)
        post("create_model", lambda service, owner, body: service.models.create(owner, body))
        post("load_weights", lambda service, owner, body: service.models.load_weights(owner, body))
        post("get_info", lambda service, owner, body: service.models.info(owner, body))
        post("forward_backward", lambda service, owner, body: service.models.forward_backward(owner, body), MOST_BODY)
        for call in ("optim_step", "save_weights", "save_weights_for_sampler", "save_weights_external"):
            post(call, partial(_submit, call))
        post("create_sampling_session", lambda service, owner, body: service.samplers.create(owner, body))
        post("join_sampling_session", lambda service, owner, body: service.samplers.join(owner, body))
        post("asample", lambda service, owner, body: service.samplers.sample(owner, body), MOST_BODY)
        post("retrieve_future", _retrieve)
        post("retrieve_futures", TinkerService.retrieve_many)
        post("cancel_future", lambda service, owner, body: service.samplers.cancel(owner, body))
        post("weights_info", TinkerService.weights_info)
        for call, why in UNSUPPORTED.items():
            post(call, partial(_refuse, call, why))
        post("sessions/{session}/finish", TinkerService.finish_session)
        get("sessions", TinkerService.list_sessions, is_paged=True)
        get("sessions/{session}", TinkerService.session)
        get("samplers/{sampler}", lambda service, owner, sampler: service.samplers.describe(owner, sampler))
        get("training_runs", lambda service, owner, **page: service.models.training_runs(owner, **page), is_paged=True)
        get("training_runs/{model}", lambda service, owner, model: service.models.training_run(owner, model))
        get("checkpoints", _all_checkpoints, is_paged=True)
        get("training_runs/{model}/checkpoints", _checkpoints)
        checkpoint = f"{API}/training_runs/{{model}}/checkpoints/{{kind}}/{{name}}"
        app.router.add_delete(checkpoint, self._delete)
        app.router.add_put(f"{checkpoint}/ttl", self._set_ttl)
        app.router.add_get(f"{checkpoint}/external_weights_urls", self._urls)
        file = f"{API}/files/{{expires}}/{{signature}}/{{model}}/{{kind}}/{{name}}/{{file:.+}}"
        app.router.add_get(file, self._file)
        app.router.add_route("*", f"{checkpoint}/publish", partial(self._refuse_route, "publishing checkpoints"))
        app.router.add_route("*", "/{path:.*}", self._unknown)
        return app

    def _get(self, app: web.Application, path: str, call: Call, *, is_paged: bool = False) -> None:
        async def handler(request: web.Request) -> web.Response:
            page = _page(request) if is_paged else {}
            return web.json_response(call(self.service, request[OWNER], *request.match_info.values(), **page))

        app.router.add_get(f"{API}/{path}", handler)

    def _post(self, app: web.Application, path: str, call: Call, most: int = SMALL_BODY) -> None:
        async def handler(request: web.Request) -> web.StreamResponse:
            answer = call(self.service, request[OWNER], *request.match_info.values(), await _read(request, most))
            if asyncio.iscoroutine(answer):
                answer = await answer
            if isinstance(answer, web.StreamResponse):
                return answer
            return web.Response(status=204) if answer is None else web.json_response(answer)

        app.router.add_post(f"{API}/{path}", handler)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check the key, and return every error as JSON with a reason: an empty 400 would count as a proxy's."""
        headers: dict[str, str] = {}
        try:
            request[OWNER] = self._owner(request)
            response = await handler(request)
            self.service.counters.add("http_responses_total", status=str(response.status))
            return response
        except web.HTTPException as error:
            status, why = error.status, error.reason
        except BadBody as error:
            status, why = error.status, str(error)
        except NotFound as error:
            status, why = 404, str(error)
        except (Gone, Forgotten) as error:
            status, why = 410, str(error)
        except TooMany as error:
            status, why = 429, str(error)
        except UserError as error:
            status, why = 400, str(error)
            headers["x-should-retry"] = "false"
        except StorageFull as error:
            status, why = 503, str(error)
        except RunError as error:
            status, why = 500, str(error)
            logger.error("%s: %s", request.path, error)
        self.service.counters.add("http_responses_total", status=str(status))
        return web.json_response({"detail": why}, status=status, headers=headers)

    def _owner(self, request: web.Request) -> str:
        """Return a name for the caller's key. Everything made with a key is visible to this key alone."""
        if request.path.startswith(f"{API}/files/") or request.path == f"{API}/healthz":
            return ""  # the URL of a file is signed
        key = request.headers.get("x-api-key") or request.headers.get("Authorization", "").removeprefix("Bearer ")
        if self._keys:
            if not any([is_same_secret(key, known) for known in self._keys]):
                raise web.HTTPUnauthorized(reason="give the server's key as api_key, or as TINKER_API_KEY")
        elif (why := stranger(request)) is not None:
            raise web.HTTPForbidden(reason=why)
        return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:16]

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=self.service.metrics_page())

    def _checkpoint(self, request: web.Request) -> Checkpoint:
        return self.service.checkpoints.seen(
            request[OWNER], "tinker://{model}/{kind}/{name}".format(**request.match_info)
        )

    async def _delete(self, request: web.Request) -> web.Response:
        self.service.checkpoints.delete(self._checkpoint(request))
        return web.Response(status=204)

    async def _set_ttl(self, request: web.Request) -> web.Response:
        ttl = bodies.TimeToLive.read(await _read(request)).ttl_seconds
        self.service.checkpoints.set_expiry(self._checkpoint(request), expiry(ttl))
        return web.Response(status=204)

    async def _urls(self, request: web.Request) -> web.Response:
        """Return a signed URL for each file. A download by such a URL needs no key."""
        checkpoint = self._checkpoint(request)
        if checkpoint.kind != "external_weights":
            raise UserError(f"{checkpoint.path}: only external_weights have URLs; save_weights_external makes them")
        expires = int(time.time()) + URL_S
        of = f"{quote(checkpoint.model_id)}/{checkpoint.kind}/{checkpoint.name}"
        urls = {}
        for file in self.service.checkpoints.files(checkpoint):
            signature = self._signature(expires, checkpoint.path, file)
            urls[file] = f"{request.url.origin()}{API}/files/{expires}/{signature}/{of}/{quote(file)}"
        until = datetime.now(UTC) + timedelta(seconds=URL_S)
        return web.json_response({"urls": urls, "expires": until.isoformat()})

    def _signature(self, expires: int, path: str, file: str) -> str:
        return hmac.new(self._secret, f"{expires}\n{path}\n{file}".encode(), hashlib.sha256).hexdigest()

    async def _file(self, request: web.Request) -> web.StreamResponse:
        part = request.match_info
        path, file = "tinker://{model}/{kind}/{name}".format(**part), part["file"]
        expires = bodies.number_of(part["expires"]) or 0
        if not is_same_secret(part["signature"], self._signature(expires, path, file)) or expires < time.time():
            raise web.HTTPForbidden(reason="the URL is not signed by this start of the server, or has expired")
        known = {checkpoint.path: checkpoint for checkpoint in self.service.checkpoints.all()}
        if path not in known or file not in self.service.checkpoints.files(known[path]):
            raise NotFound(f"{path} has no file {file}")
        return web.FileResponse(self.service.checkpoints.content(known[path]) / file)

    async def _refuse_route(self, what: str, request: web.Request) -> web.Response:
        raise UserError(f"{what} is not supported here")

    async def _unknown(self, request: web.Request) -> web.Response:
        raise NotFound(f"{request.method} {request.path} is not supported here; docs/tinker.md lists what is")


def _capabilities(service: TinkerService, owner: str) -> dict[str, Any]:
    model = {"model_name": service.settings.model, "max_context_length": service.settings.max_length}
    return {"supported_models": [model | {"trainable": True, "sampleable": True}]}


def _checkpoints(service: TinkerService, owner: str, model: str) -> dict[str, Any]:
    return {"checkpoints": service.checkpoints.listed(owner, model)}


def _all_checkpoints(service: TinkerService, owner: str, *, limit: int, offset: int) -> dict[str, Any]:
    listed = service.checkpoints.listed(owner)
    cursor = {"limit": limit, "offset": offset, "total_count": len(listed)}
    return {"checkpoints": listed[offset : offset + limit], "cursor": cursor}


def _submit(call: str, service: TinkerService, owner: str, body: bytes) -> Any:
    return service.models.submit_json(owner, call, body)


async def _retrieve(service: TinkerService, owner: str, body: bytes) -> web.Response:
    result: Result | None = await service.retrieve(owner, body)
    if result is None:  # the client asks again at once, and needs no warning
        return web.json_response({"type": "try_again", "queue_state": "active"}, status=408)
    return web.Response(body=result.body, content_type=PROTOBUF if result.is_protobuf else "application/json")


def _refuse(call: str, why: str, service: TinkerService, owner: str, body: bytes) -> None:
    raise UserError(f"{call} is not supported here: {why}")


def _page(request: web.Request) -> dict[str, int]:
    page = {}
    for name, default in (("limit", 20), ("offset", 0)):
        text = request.query.get(name, str(default))
        if (number := bodies.number_of(text)) is None:
            raise UserError(f"{name}: is {text!r:.40}, expected a whole number")
        page[name] = number
    return page | {"limit": min(page["limit"], MOST_LISTED)}


async def _read(request: web.Request, most: int = SMALL_BODY) -> bytes:
    """Return the body of a request, decompressed. UserError: the body is too large, or not compressed by zstd."""
    _refuse_large(request.content_length or 0, most)
    body = await read_body(request)
    _refuse_large(len(body), most)
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding == "identity":
        return body
    if encoding != "zstd":
        raise UserError(f"Content-Encoding {encoding:.40} is not supported here; use zstd")
    try:
        size = zstandard.frame_content_size(body)
        if size < 0:
            raise UserError("the frame of zstd does not give the size of the body, which this server needs")
        _refuse_large(size, most)
        content: bytes = zstandard.ZstdDecompressor().decompress(body, max_output_size=most)
    except zstandard.ZstdError as error:
        raise UserError(f"the body is not compressed by zstd: {error}") from error
    return content


def _refuse_large(size: int, most: int) -> None:
    if size > most:
        raise UserError(f"the body has {size} bytes, and this call takes up to {most}")

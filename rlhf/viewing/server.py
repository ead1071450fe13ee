"""Serve the page and answer its requests. Requests only read, except for a browser's login.

GET  /                        the page, with files under /static/
POST /login                   Authorization: Bearer TOKEN; sets a cookie for later requests
GET  /api/runs                runs with their state, and the meaning of each metric
GET  /api/metrics?run=        rows of metrics.jsonl from a position on; /api/errors likewise
GET  /api/summary?run=        the overview of a run
GET  /api/samples?run=&step=  short forms of a step's responses
GET  /api/responses?...&at=   some responses in full
GET  /api/image?run=&name=    a small version of an image in the run's folder
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from aiohttp import web

from rlhf.errors import RunError, UserError
from rlhf.serving import gives_token, is_same_secret, serve_until_interrupted, serving_token, stranger
from rlhf.tracking.metrics.declarations import METRICS
from rlhf.tracking.run_folder.folder import images_folder
from rlhf.viewing.runs import RunPlace, RunPlaces
from rlhf.viewing.samples import MOST_WHOLE, SampleFiles
from rlhf.viewing.summary import Summaries
from rlhf.viewing.tail import read_chunk
from rlhf.vision.thumbnails import CONTENT_TYPE, encoded_thumbnail

STATIC = Path(__file__).parent / "static"
_COOKIE = "rlhf-view"
_FOREVER = "private, max-age=31536000, immutable"  # the name of an image changes with the content
_OPEN = ("/", "/login", "/favicon.ico")
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
DECLARED: Sequence[dict[str, str]] = [  # literal names go before patterns
    {"pattern": metric.pattern, "unit": metric.unit, "meaning": metric.meaning}
    for metric in sorted(METRICS.values(), key=lambda metric: "<" in metric.name)
]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class RunViewer:
    """The web application. `token` None: everyone may look who reaches the page by a name of this machine."""

    def __init__(self, places: RunPlaces, token: str | None) -> None:
        self.runs, self.token = places, token
        self.samples, self.summaries = SampleFiles(), Summaries()

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._guard])
        get = app.router.add_get
        get("/", self._page)
        get("/api/runs", self._runs)
        get("/api/metrics", partial(self._tail, "metrics.jsonl", last=False))
        get("/api/errors", partial(self._tail, "errors.jsonl", last=True))
        get("/api/summary", self._summary)
        get("/api/samples", self._samples)
        get("/api/responses", self._responses)
        get("/api/image", self._image)
        app.router.add_post("/login", self._login)
        app.router.add_static("/static", STATIC)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Check access, return errors as JSON objects, and set the headers of every answer."""
        try:
            response = self._refusal(request) or await handler(request)
        except web.HTTPException as error:
            response = _error(error.status, error.reason)
        for name, value in _HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    def _refusal(self, request: web.Request) -> web.Response | None:
        if self.token is None:
            why = stranger(request)
            return None if why is None else _error(403, why)
        if request.path in _OPEN or request.path.startswith("/static/"):
            return None
        given = request.cookies.get(_COOKIE, "")
        if gives_token(request, self.token) or is_same_secret(given, _cookie(self.token)):
            return None
        return _error(401, "log in with the token of this server")

    async def _page(self, _: web.Request) -> web.StreamResponse:
        return web.FileResponse(STATIC / "index.html")

    async def _login(self, request: web.Request) -> web.Response:
        response = web.json_response({})
        if self.token is not None:
            if not gives_token(request, self.token):
                return _error(401, "the token is wrong")
            response.set_cookie(_COOKIE, _cookie(self.token), httponly=True, samesite="Strict", path="/")
        return response

    async def _runs(self, request: web.Request) -> web.Response:
        states = await asyncio.to_thread(lambda: [run.state() for run in self.runs.by_name().values()])
        return web.json_response({"runs": states, **({"metrics": DECLARED} if request.query.get("metrics") else {})})

    async def _tail(self, name: str, request: web.Request, *, last: bool) -> web.Response:
        start, mark = _number(request, "from", default=0), _number(request, "mark", default=0)
        path = self._run(request).path / name
        chunk = await asyncio.to_thread(read_chunk, path, start, mark, last=last)
        position = {"next": chunk.next, "mark": chunk.mark, "reset": chunk.reset, "more": chunk.more}
        return web.Response(
            body=chunk.lines, content_type="application/jsonl", headers={"X-Place": json.dumps(position)}
        )

    async def _summary(self, request: web.Request) -> web.Response:
        run = self._run(request)
        try:
            return web.json_response(await asyncio.to_thread(self.summaries.of, run))
        except UserError as error:
            raise web.HTTPInternalServerError(reason=f"{run.name}: config.resolved.yaml cannot be read") from error

    async def _samples(self, request: web.Request) -> web.Response:
        path = self._run(request).samples(_number(request, "step"))
        try:
            index = await asyncio.to_thread(self.samples.index, path)
        except OSError as error:
            raise web.HTTPNotFound(reason="no samples of this step") from error
        prompts = {group: asdict(prompt) for group, prompt in index.prompts.items()}
        listing = {"version": index.version, "rows": index.rows, "prompts": prompts, "bad_lines": index.bad_lines}
        return web.json_response(listing)

    async def _responses(self, request: web.Request) -> web.Response:
        path = self._run(request).samples(_number(request, "step"))
        try:
            rows = [int(row) for row in request.query.get("at", "").split(",")]
        except ValueError as error:
            raise web.HTTPBadRequest(reason="at: give the positions of responses, such as 0,1,2") from error
        if len(rows) > MOST_WHOLE or min(rows) < 0:
            raise web.HTTPBadRequest(reason=f"at: give at most {MOST_WHOLE} positions, from 0 on")
        version = request.query.get("version", "")
        try:
            lines = await asyncio.to_thread(self.samples.whole, path, version, rows)
        except (OSError, IndexError) as error:
            raise web.HTTPNotFound(reason="no such response") from error
        if lines is None:
            raise web.HTTPConflict(reason="the samples of this step were written again")
        return web.Response(body=lines, content_type="application/jsonl")

    async def _image(self, request: web.Request) -> web.Response:
        folder = images_folder(self._run(request).path)
        try:
            data = await asyncio.to_thread(encoded_thumbnail, folder, request.query.get("name", ""))
        except (UserError, RunError) as error:
            raise web.HTTPNotFound(reason="no such image") from error
        return web.Response(body=data, content_type=CONTENT_TYPE, headers={"Cache-Control": _FOREVER})

    def _run(self, request: web.Request) -> RunPlace:
        run = self.runs.by_name().get(request.query.get("run", ""))
        if run is None:
            raise web.HTTPNotFound(reason="no such run")
        return run


def _cookie(token: str) -> str:
    """Return the cookie of a logged-in browser, derived from the token without revealing the token."""
    return hmac.digest(os.fsencode(token), b"rlhf view", "sha256").hex()


def _number(request: web.Request, name: str, *, default: int | None = None) -> int:
    value = request.query.get(name, default)
    try:
        return int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise web.HTTPBadRequest(reason=f"{name}: give a whole number") from error


def _error(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)


def serve_runs(
    folders: Sequence[Path], *, host: str, port: int, token_env: str | None, ready: Callable[[str], None]
) -> None:
    """Serve until interrupted. `ready` is called with the address."""
    viewer = RunViewer(RunPlaces(folders), serving_token(host, token_env))
    serve_until_interrupted(viewer.application(), host=host, port=port, ready=lambda address: ready(f"{address}/"))

"""Serve rewards over HTTP (`rlhf serve-reward`), with the protocol of a reward with a `url`.

GET /health answers {"status": "ok"}.

POST /score takes {"prompt": ..., "responses": [...], "columns": {...}, "truncated": [...], "results": [...]}. The
answer is {"scores": [...], "rewards": {NAME: [...]}}, or {"errors": [{"sample", "kind", "message"}]}.

A request is a single group. Without a token, only this machine is served. Images of the prompt are data URIs in column
`images`; the rewards get files, which are removed after the request. The server opens no file and no address that a
request names as an image.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from aiohttp import web
from pydantic import Field, JsonValue

from rlhf.config.mistakes.explain import parse_as
from rlhf.errors import RunError, UserError
from rlhf.process.owned_folders import temporary_folder
from rlhf.rewards.loading import MAX_DEPTH, is_nested_too_deep
from rlhf.rewards.scoring import asks_in_flight
from rlhf.rewards.services.images import IMAGES, stored_images
from rlhf.scoring.scorer import Group, Scorer, Scoring
from rlhf.sections import Section
from rlhf.serving import BadBody, gives_token, read_text, serve_until_interrupted, serving_token, stranger
from rlhf.tracking import logs
from rlhf.types import RESULT_COLUMN, GroupScores, Prompt
from rlhf.vision.reading import ImageCollector, ImageLimits
from rlhf.vision.store import ImageStore

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 16 * 2**20
MAX_WAITING = 1024  # open requests; further requests get status 503
LONGEST_S = 3600.0  # limit from a request to its answer


class ScoreRequest(Section):
    """The body of a request."""

    prompt: str
    """The prompt."""
    responses: tuple[str, ...] = Field(min_length=1)
    """Responses to the prompt."""
    columns: dict[str, JsonValue] = Field(default_factory=dict)
    """The columns of the prompt's row."""
    truncated: tuple[bool, ...] | None = None
    """Whether each response is truncated. null: none is."""
    results: tuple[JsonValue, ...] | None = None
    """The result of an agent's session for each response. null: there is no agent."""


class RewardServer:
    """The web application. With `token` None every reachable client may send requests."""

    def __init__(self, scorer: Scorer, scoring: Scoring, token: str | None, images: Path) -> None:
        self.scorer = scorer
        self.folder = images
        seen = None if scoring.images is None else scoring.images(images)
        self.limits = None if seen is None else replace(seen.reader.limits, hosts=())  # None: the model reads only text
        self.token = token
        self.waiting = 0
        self.asking = ThreadPoolExecutor(max(asks_in_flight(scoring.specs), 1))
        self.scoring = ThreadPoolExecutor(scoring.policy.processes)

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._guard])
        app.router.add_get("/health", self._health)
        app.router.add_post("/score", self._score)
        return app

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Check the token, and return errors as JSON objects."""
        if self.token is None:
            why = stranger(request)
            if why is not None:
                return _error(403, why)
        elif request.path != "/health" and not gives_token(request, self.token):
            return _error(401, "give the token as `Authorization: Bearer TOKEN`")
        try:
            return await handler(request)
        except web.HTTPRequestEntityTooLarge:
            return _error(413, f"the body has more than {MAX_BODY_BYTES} bytes")
        except web.HTTPException as error:
            return _error(error.status, f"{error.reason}: there are GET /health and POST /score")
        except RunError as error:
            logger.error("%s", error)
            return _error(500, str(error))

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _score(self, request: web.Request) -> web.Response:
        if self.waiting >= MAX_WAITING:
            return _error(503, f"{MAX_WAITING} requests are waiting already")
        with TemporaryDirectory(dir=self.folder) as images:
            try:
                group = await asyncio.to_thread(self._with_files, parse_request(await read_text(request)), Path(images))
                self._refuse_unfit(group)
            except BadBody as error:
                return _error(error.status, str(error))
            except (ValueError, UserError) as error:
                return _error(400, str(error))
            return await self._scored(group)

    async def _scored(self, group: Group) -> web.Response:
        self.waiting += 1
        try:
            async with asyncio.timeout(LONGEST_S):
                loop = asyncio.get_running_loop()
                outcomes = await loop.run_in_executor(self.asking, self.scorer.ask, group)
                scores = await loop.run_in_executor(self.scoring, self.scorer.score, group, outcomes)
                return web.json_response(_as_json(scores))
        except TimeoutError:
            return _error(503, f"not done within {LONGEST_S:g} s")
        finally:
            self.waiting -= 1

    def _with_files(self, group: Group, folder: Path) -> Group:
        """Return the group with files in place of the images in column `images`. UserError: no data URI, or no image.

        For a text-only model, a column without data URIs holds something else, and stays.
        """
        images = group.prompt.columns.get(IMAGES)
        of_data = any(str(one)[:11] == "data:image/" for one in images) if isinstance(images, list) else False
        if images is None or (self.limits is None and not of_data):
            return group
        reader = ImageCollector(ImageStore(folder), self.limits or ImageLimits())
        if not isinstance(images, list) or len(images) > reader.limits.max_images:
            raise UserError(f"columns.{IMAGES}: expected a list of at most {reader.limits.max_images} data URIs")
        places = [f"columns.{IMAGES}[{number}]" for number in range(len(images))]
        keys = [reader.add(image, place=place, folder=None) for image, place in zip(images, places, strict=True)]
        columns = {**group.prompt.columns, IMAGES: [str(reader.store.path(key)) for key in keys]}
        return replace(group, prompt=replace(group.prompt, columns=columns))

    def _refuse_unfit(self, group: Group) -> None:
        """Raise ValueError for columns the rewards cannot score."""
        prompt = group.prompt
        names = [*prompt.columns, *([RESULT_COLUMN] if group.results else [])]
        here = {spec.name: spec for spec in self.scorer.specs if spec.applies_to(prompt.columns)}
        if not here:
            raise ValueError("no reward applies to these columns")
        blind = next((spec.name for spec in here.values() if spec.is_model), None)
        if blind is not None and stored_images(prompt.columns):
            raise ValueError(f"the reward model of {blind} gets only the text here, and columns.{IMAGES} has images")
        for spec in here.values():
            if spec.gate is not None and spec.gate not in here:
                raise ValueError(f"{spec.gate} does not apply to these columns, and is the gate of {spec.name}")
            wanted = [name for function in spec.functions.values() for name in function.signature.required]
            if spec.remote is not None and spec.remote.judge is not None:
                wanted += spec.remote.judge.columns
            if absent := [name for name in wanted if name not in names]:
                there = ", ".join(names) or "none"
                raise ValueError(f"{spec.name} needs columns {', '.join(absent)}; there are: {there}")


def parse_request(text: str) -> Group:
    """Parse a request's body. ValueError describes an invalid body."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ValueError("the body is no JSON object")
    for name in ("columns", "results"):
        if is_nested_too_deep({name: body.get(name)}):
            raise ValueError(f"{name}: nested deeper than {MAX_DEPTH} levels")
    request = parse_as(ScoreRequest, body)
    if isinstance(request, tuple):
        raise ValueError("; ".join(f"{'.'.join(problem.key)}: {problem.text}" for problem in request))
    truncated = request.truncated if request.truncated is not None else (False,) * len(request.responses)
    for name, values in (("truncated", truncated), ("results", request.results)):
        if values is not None and len(values) != len(request.responses):
            raise ValueError(f"{name}: has {len(values)} values, expected one for each response")
    prompt = Prompt(prompt_id=0, token_ids=(), text=request.prompt, columns=request.columns)
    return Group(prompt=prompt, responses=request.responses, truncated=truncated, results=tuple(request.results or ()))


def _as_json(scores: GroupScores) -> dict[str, Any]:
    errors = [{"sample": e.sample, "kind": e.kind, "message": f"{e.reward}: {e.message}"} for e in scores.errors]
    return (
        {"errors": errors}
        if errors
        else {
            "scores": list(scores.scores),
            "rewards": {name: list(values) for name, values in scores.measured.items()},
        }
    )


def _error(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)


def serve_scores(
    scoring: Scoring, *, host: str, port: int, token_env: str | None, ready: Callable[[str], None]
) -> None:
    """Serve until interrupted. `ready` is called with the address."""
    logs.configure()
    token = serving_token(host, token_env)
    with temporary_folder() as images, Scorer(scoring) as scorer:
        server = RewardServer(scorer, scoring, token, images)
        application = server.application()
        try:
            serve_until_interrupted(application, host=host, port=port, ready=lambda at: ready(f"{at}/score"))
        finally:
            server.asking.shutdown(wait=False, cancel_futures=True)
            server.scoring.shutdown(wait=False, cancel_futures=True)

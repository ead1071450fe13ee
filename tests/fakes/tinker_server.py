"""`python -m tests.fakes.tinker_server FOLDER PORT [KEY]`: the Tinker server before fake ranks and engines.

A test can kill this separate process.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import web

from actors.serving.tinker.http import TinkerServer
from rlhf.hosting.images import ClientImages
from rlhf.hosting.service import TinkerService, locked_server
from rlhf.hosting.shared import ServiceSettings
from rlhf.roles import AdapterEnginesRole, AdaptersRole
from rlhf.vision.processor import ImageProcessing
from tests.fakes.adapters import FakeAdapters, FakeEngines

MODEL = "fakes/tiny"


def settings(**changes: object) -> ServiceSettings:
    values: dict[str, object] = {
        "model": MODEL,
        "base": MODEL,
        "tokenizer": MODEL,
        "max_length": 64,
        "max_adapters": 4,
        "trains_all": False,
        "max_models": 8,
        "checkpoint_bytes": 1 << 20,
        "idle_s": 300.0,
        "dtype": "float32",
        "seed": 0,
        "probe_ids": (1, 2, 3, 4),
    }
    return ServiceSettings(**(values | changes))  # type: ignore[arg-type]


def text_of(tokens: object) -> str:
    return " ".join(map(str, tokens))  # type: ignore[call-overload]


@asynccontextmanager
async def opened(
    folder: Path,
    policy: AdaptersRole | None = None,
    engines: AdapterEnginesRole | None = None,
    processing: ImageProcessing | None = None,
    **changes: object,
) -> AsyncIterator[TinkerService]:
    with locked_server(folder):
        service = TinkerService(
            folder,
            settings(**changes),
            policy or FakeAdapters(),
            engines or FakeEngines(),
            decode=text_of,
            images=ClientImages(folder / "service" / "images", processing),
        )
        try:
            yield service
        finally:
            await service.close()


async def serve(folder: Path, port: int, keys: list[str], policy: FakeAdapters | None = None) -> None:
    server = TinkerServer(opened(folder, policy), keys)
    runner = web.AppRunner(server.application(), auto_decompress=False, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    raise await server.service.lost


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))

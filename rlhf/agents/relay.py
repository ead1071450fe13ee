"""Pass connections between an agent in a sandbox and the engine's front, through a Unix socket in the agent's folder.

The sandbox has no network. Inside, this file is a program that listens at the model's address and starts the agent.
Outside, `forwarding` connects the socket to the front. This file must use only the standard library.
"""

import asyncio
import os
import resource
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

PORT = 8000  # in the sandbox's own network
MAX_CONNECTIONS = 64  # of one agent at once
_CHUNK = 1 << 16
Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy bytes until the end of the reader, then close the writer."""
    with suppress(ConnectionError):
        while chunk := await reader.read(_CHUNK):
            writer.write(chunk)
            await writer.drain()
    writer.close()


def linking(connect: Connect) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    """Return a handler to link each accepted connection with a connection from `connect`, up to MAX_CONNECTIONS."""
    linked: set[asyncio.StreamWriter] = set()

    async def link(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(linked) == MAX_CONNECTIONS:
            writer.close()
            return
        linked.add(writer)
        try:
            there_reader, there_writer = await connect()
            await asyncio.gather(pump(reader, there_writer), pump(there_reader, writer))
        except OSError:
            writer.close()
        finally:
            linked.remove(writer)

    return link


@contextmanager
def forwarding(path: str, host: str, port: int) -> Iterator[None]:
    """Forward the connections of a Unix socket to an address, in a thread, for the length of the block."""
    listening, loop = threading.Event(), asyncio.new_event_loop()

    def serve() -> None:
        asyncio.set_event_loop(loop)
        start = asyncio.start_unix_server(linking(lambda: asyncio.open_connection(host, port)), path)
        loop.run_until_complete(start)
        listening.set()
        loop.run_forever()

    threading.Thread(target=serve, daemon=True).start()
    if not listening.wait(10.0):
        raise OSError(f"the relay at {path} does not listen")
    try:
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)


async def run_inside(path: str, max_threads: int, command: list[str]) -> int:
    """Listen inside the sandbox, run the command, and return its exit code.

    The kernel counts the threads of this sandbox alone. Root has no limit.
    """
    resource.setrlimit(resource.RLIMIT_NPROC, (max_threads, max_threads))
    await asyncio.start_server(linking(lambda: asyncio.open_unix_connection(path)), "127.0.0.1", PORT)
    process = await asyncio.create_subprocess_exec(*command)
    return await process.wait()


if __name__ == "__main__":
    code = asyncio.run(run_inside(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
    os._exit(code if code >= 0 else 128 - code)

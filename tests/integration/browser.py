"""A real headless browser over the DevTools protocol: pages, keys, the rendered content, and errors."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-quic"),
    *("--remote-debugging-port=0", "--remote-allow-origins=*"),
)
DEADLINE_S = 60.0
_KEY_CODES = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35, "Escape": 27}


def program() -> str | None:
    """Return the path of this machine's browser."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


# an element has no JSON value; the test only needs its presence
_TRIED = "(() => { try { const it = (%s); return it instanceof Node ? true : it } catch { return null } })()"


class Page:
    """A tab. `wrong` collects errors of scripts and of the console, including refused resources."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.count = 0
        self.answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.wrong: list[str] = []
        self.requested: list[str] = []
        self.reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for message in self.socket:
            told = json.loads(message.data)
            if told.get("id") in self.answers:
                self.answers.pop(told["id"]).set_result(told)
                continue
            method, params = told.get("method"), told.get("params", {})
            if method == "Runtime.exceptionThrown":
                self.wrong.append(json.dumps(params["exceptionDetails"])[:2000])
            elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
                self.wrong.append(params["entry"]["text"])
            elif method == "Network.requestWillBeSent":
                self.requested.append(params["request"]["url"])

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command; RuntimeError for a refused command."""
        self.count += 1
        future = self.answers[self.count] = asyncio.get_running_loop().create_future()
        await self.socket.send_str(json.dumps({"id": self.count, "method": method, "params": params}))
        told = await asyncio.wait_for(future, DEADLINE_S)
        if "error" in told:
            raise RuntimeError(f"{method}: {told['error']}")
        found: dict[str, Any] = told["result"]
        return found

    async def open(self, url: str, *, width: int = 1280, height: int = 860, dark: bool = False) -> None:
        """Open the address in a window of the given size."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.call("Emulation.setEmulatedMedia", features=scheme)
        await self.call("Page.navigate", url=url)

    async def value(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        told = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in told:
            raise RuntimeError(f"{expression}: {json.dumps(told['exceptionDetails'])[:500]}")
        return told["result"].get("value")

    async def until(self, expression: str) -> Any:
        """Wait until an expression is true, and return the value. AssertionError has the page's content."""
        end = asyncio.get_running_loop().time() + DEADLINE_S
        while asyncio.get_running_loop().time() < end:
            found = await self.value(_TRIED % expression)
            if found:
                return found
            await asyncio.sleep(0.05)
        text = await self.value("document.body?.innerText")
        raise AssertionError(f"{expression} did not come true; wrong: {self.wrong}; the page:\n{text}")

    async def press(self, key: str, *, shift: bool = False) -> None:
        """Press a key, and release it."""
        code = _KEY_CODES.get(key, ord(key.upper()[0]) if key.isalnum() else 0)
        common: dict[str, Any] = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        text = {"text": key} if len(key) == 1 else {}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    async def point(self, expression: str) -> None:
        """Move the pointer over an element."""
        await self.value(f"{expression}.scrollIntoView({{block: 'center'}})")
        x, y = await self.value(
            f"((box) => [box.x + box.width / 2, box.y + box.height / 2])({expression}.getClientRects()[0])"
        )
        await self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)


@asynccontextmanager
async def browser() -> AsyncIterator[Page]:
    """Yield a browser with one page and a separate profile, ended with the block."""
    found = program()
    assert found is not None
    with tempfile.TemporaryDirectory() as folder:
        command, silent = [found, *FLAGS, f"--user-data-dir={folder}", "about:blank"], asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(
            *command,
            stdout=silent,
            stderr=silent,
            start_new_session=True,  # some distributions start the browser from a script
        )
        try:
            async with aiohttp.ClientSession() as session:
                port = await _port(Path(folder))
                async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
                    pages = [one for one in await response.json(content_type=None) if one["type"] == "page"]
                async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=2**26) as socket:
                    page = Page(socket)
                    yield page
                    page.reader.cancel()
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
            await asyncio.sleep(0.2)  # the browser's children still write to the profile


async def _port(folder: Path) -> int:
    end = asyncio.get_running_loop().time() + DEADLINE_S
    while asyncio.get_running_loop().time() < end:
        path = folder / "DevToolsActivePort"
        if path.exists() and path.read_text():
            return int(path.read_text().split()[0])
        await asyncio.sleep(0.05)
    raise AssertionError(f"the browser opened no port within {DEADLINE_S:g} s")

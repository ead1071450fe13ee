"""Play an environment over HTTP, for environments that cannot be installed with the run.

The protocol is in docs/environments.md. A failed call is a failure of the environment. A call is never repeated, since
the server may have taken the turn.
"""

from __future__ import annotations

import base64
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any


def checked_headers(url: str, token_env: str | None) -> dict[str, str]:
    """Return the header with the bearer token, if any. ValueError for a URL not of HTTP, or an unset variable."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url is {url!r}, expected a URL that begins with http:// or https://")
    if token_env is not None and token_env not in os.environ:
        raise ValueError(f"the environment variable {token_env} for the token is not set")
    return {} if token_env is None else {"Authorization": f"Bearer {os.environ[token_env]}"}


class HttpEnvironment:
    """Posts JSON to `url`/reset, /step and /close.

    `token_env` is the environment variable with a bearer token. None sends no token.
    """

    def __init__(self, url: str, token_env: str | None = None, timeout_s: float = 60.0) -> None:
        self.headers = {"Content-Type": "application/json", **checked_headers(url, token_env)}
        self.url = url.rstrip("/")
        self.timeout_s = timeout_s
        self.session: str | None = None

    def reset(self, seed: int, **columns: Any) -> str | list[Any] | None:
        """Open a session on the server."""
        answer = self._post("reset", {"seed": seed, "columns": columns})
        self.session = answer["session"]
        return _with_images(answer["observation"])

    def step(self, response: str) -> tuple[str | list[Any] | None, float, bool]:
        """Send a turn of the policy, and return the server's answer."""
        answer = self._post("step", {"session": self.session, "response": response})
        return _with_images(answer["observation"]), answer["reward"], answer["done"]

    def close(self) -> None:
        """Ask the server to end the session."""
        if self.session is not None:
            self._post("close", {"session": self.session})

    def _post(self, call: str, message: Mapping[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(f"{self.url}/{call}", json.dumps(message).encode(), self.headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
                result = json.load(answer)
        except urllib.error.HTTPError as error:
            reason = error.read(500).decode(errors="replace")
            raise RuntimeError(f"{self.url}/{call} answered {error.code}: {reason}") from error
        if not isinstance(result, dict):
            raise TypeError(f"{self.url}/{call} answered {result!r:.80}, expected a JSON object")
        return result


def _with_images(observation: Any) -> str | list[Any] | None:
    """Return an observation with the bytes of each image in place of base64. ValueError: a text is not base64."""
    if not isinstance(observation, list):
        return observation  # type: ignore[no-any-return]
    return [
        {**part, "image": base64.b64decode(part["image"].rpartition(",")[2], validate=True)}  # also of a data URI
        if isinstance(part, Mapping) and isinstance(part.get("image"), str)
        else part
        for part in observation
    ]

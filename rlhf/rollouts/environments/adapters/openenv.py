"""Play an environment of an OpenEnv server over its WebSocket: each connection is a separate session.

Written for openenv-core 0.3.0. A failed call is never repeated, and counts as a failure of the environment.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlhf.rollouts.environments.adapters.http import checked_headers

if TYPE_CHECKING:
    from websockets.sync.client import ClientConnection

RESPONSE = "{response}"  # placeholder of the policy's turn in `action`
MOST_BYTES = 16 * 2**20  # limit of a message


class OpenEnv:
    """The environment at `url`.

    `action` is the message of a turn, with `{response}` in at least one text. `observation` is the field of an
    observation the policy reads; None sends all fields as JSON. `token_env` is the environment variable with a bearer
    token; None sends no token.
    """

    def __init__(
        self,
        url: str,
        action: Mapping[str, Any],
        observation: str | None = None,
        token_env: str | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        try:
            from websockets.exceptions import ConnectionClosed
            from websockets.sync.client import connect
        except ImportError as error:
            raise ImportError(
                f"websockets is not installed ({error}); install the extra: pip install 'ray-rlhf[openenv]'"
            ) from error
        self.headers = checked_headers(url, token_env)
        if RESPONSE not in json.dumps(action):
            raise ValueError(f"action is {action!r:.100}, which has no {RESPONSE} as the place of the policy's turn")
        self.connect, self.closed = connect, ConnectionClosed
        self.url = f"ws{url.removeprefix('http').rstrip('/')}/ws"
        self.action = action
        self.observation = observation
        self.timeout_s = timeout_s
        self.session: ClientConnection | None = None

    def reset(self, seed: int, **columns: Any) -> str | None:
        """Open a session. The server passes the columns known to the environment to `reset`."""
        self.session = self.connect(
            self.url, additional_headers=self.headers, open_timeout=self.timeout_s, max_size=MOST_BYTES
        )
        return self._observation_text(self._ask("reset", {"seed": seed, **columns})) or None

    def step(self, response: str) -> tuple[str, float, bool]:
        """Send a turn of the policy, and return the observation, the reward and the end."""
        result = self._ask("step", _filled(self.action, response))
        return self._observation_text(result), float(result["reward"] or 0.0), bool(result["done"])

    def close(self) -> None:
        """End the session by closing the connection."""
        if self.session is not None:
            self.session.close()

    def _ask(self, kind: str, message: Any) -> dict[str, Any]:
        assert self.session is not None
        with contextlib.suppress(self.closed):  # a full server sends an error and closes; the error is read below
            self.session.send(json.dumps({"type": kind, "data": message}))
        answer = json.loads(self.session.recv(timeout=self.timeout_s))
        if answer["type"] != "observation":
            raise RuntimeError(f"{self.url} answered {kind} with {answer['type']}: {answer['data']!r:.400}")
        return answer["data"]  # type: ignore[no-any-return]

    def _observation_text(self, result: Mapping[str, Any]) -> str:
        """Return the text the policy reads of an answer."""
        observation = result["observation"]
        if self.observation is not None:
            if self.observation not in observation:
                fields = ", ".join(observation) or "no fields"
                raise KeyError(f"the observation has {fields}, but not {self.observation}")
            observation = observation[self.observation]
        if not observation:
            return ""
        return observation if isinstance(observation, str) else json.dumps(observation, ensure_ascii=False)


def _filled(action: Any, response: str) -> Any:
    """Return the action with the response inserted, at any depth."""
    if isinstance(action, str):
        return action.replace(RESPONSE, response)
    if isinstance(action, Mapping):
        return {key: _filled(value, response) for key, value in action.items()}
    if isinstance(action, list | tuple):
        return [_filled(value, response) for value in action]
    return action

"""Speak to a server of the Tinker protocol with the official client. Every wait has a deadline and a clear error.

The client itself repeats requests for five minutes, so a server that comes back in time is not noticed. The package of
the client is optional, and only this module imports the classes of the client.
"""

from __future__ import annotations

import importlib
import logging
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import urlsplit

from rlhf.errors import RESUMES, RunError, UserError

KEY_VARIABLE = "TINKER_API_KEY"
CONNECT_S = 10.0  # limit for a server to accept a connection
TELL_S = 10.0  # limit for a request whose result nobody needs
ANSWER_S = 60.0  # limit for a server to list its models
logger = logging.getLogger(__name__)


def client_package() -> Any:
    """Return the official client's package. UserError: the client is not installed."""
    try:
        return importlib.import_module("tinker")
    except ImportError as error:
        raise UserError(
            f"policy.tinker: needs the official client: `pip install 'ray-rlhf[tinker]'` ({error})"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class TinkerEndpoint:
    """A server with a base model. The key is a secret."""

    url: str
    key: str = field(repr=False)
    base_model: str  # the policy's model: a name on the hub, or a folder

    @classmethod
    def of(cls, url: str, base_model: str) -> TinkerEndpoint:
        """Return the server with the key of the environment. UserError: there is no key."""
        key = os.environ.get(KEY_VARIABLE, "")
        if not (key.startswith("tml-") and key.isascii() and key.isprintable()):
            raise UserError(
                f"policy.tinker: the environment variable {KEY_VARIABLE} must hold a key that begins with `tml-`. "
                "Export the key of the server. A server without keys accepts any such key, for example tml-anything."
            )
        folder = Path(base_model)
        named = str(folder.resolve()) if folder.is_dir() else base_model
        return cls(url=url.rstrip("/"), key=key, base_model=named)

    def refuse_unfit(self, *, longest_sequence: int) -> None:
        """Raise UserError if the server does not answer, lacks the model, or takes shorter sequences only."""
        _, limit = self.served_model()
        if limit is not None and longest_sequence > limit:
            raise UserError(
                f"policy.tinker: {self.url} takes sequences of at most {limit} tokens, and the run's longest has "
                f"{longest_sequence}. Shorten the run's sequences, or start the server with a longer limit "
                "(service.max_length of rlhf tinker)."
            )

    def served_model(self) -> tuple[str, int | None]:
        """Return the name of the base model at the server, and the most tokens of a sequence, if the server says so.

        A local folder is the served model with the same last part of the name: a model of the hub, or a folder at
        another place.
        """
        self._refuse_closed()
        tinker = client_package()
        try:
            models = self.rest().get_server_capabilities().result(timeout=ANSWER_S).supported_models
        except (tinker.TinkerError, TimeoutError, ValueError, RuntimeError) as error:
            reason = str(error) or f"no answer within {ANSWER_S:.0f} s"
            raise UserError(f"policy.tinker: {self.url} does not say which models it serves: {reason}") from error
        served = {str(model.model_name): model.max_context_length for model in models}
        last = PurePath(self.base_model).name
        alike = [name for name in served if PurePath(name).name == last]
        if self.base_model in served:
            return self.base_model, served[self.base_model]
        if PurePath(self.base_model).is_absolute() and len(alike) == 1:
            return alike[0], served[alike[0]]
        names = ", ".join(sorted(served)) or "no model"
        raise UserError(
            f"policy.tinker: {self.url} serves {names}, and policy.model is {self.base_model}. Name a served model as "
            "policy.model, or start a server for this model."
        )

    def rest(self) -> Any:
        """Return the client of everything at the server that is no training and no sampling."""
        return client_package().RestClient(base_url=self.url, api_key=self.key)

    def _refuse_closed(self) -> None:
        """Raise UserError if nothing listens. The client itself would try for five minutes."""
        parts = urlsplit(self.url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((parts.hostname or "", port), timeout=CONNECT_S).close()
        except OSError as error:
            raise UserError(
                f"policy.tinker: nothing answers at {self.url}: {error}. Start the server first."
            ) from error


class TinkerClient:
    """A session at a server. `limit_s`: for the answer to one request, with all attempts of the client."""

    def __init__(self, server: TinkerEndpoint, *, run: str, limit_s: float) -> None:
        """Open a session. UserError: the server does not answer, or lacks the model."""
        self.server, self.limit_s = server, limit_s
        self.model, _ = server.served_model()
        self.types: Any = client_package().types
        service_client = client_package().ServiceClient
        self.service: Any = service_client(base_url=server.url, api_key=server.key, user_metadata={"run": run})
        self.rest: Any = server.rest()
        logger.info("the policy is the model %s at %s", self.model, server.url)

    def wait(self, future: Any, what: str, *, limit_s: float | None = None) -> Any:
        """Return the result of a request. RunError: the server refused the request, or did not answer."""
        from tinker.lib.retryable_exception import RetryableException

        tinker, place = client_package(), f"policy.tinker: {self.server.url}"
        limit_s = self.limit_s if limit_s is None else limit_s
        try:
            return future.result(timeout=limit_s)
        except TimeoutError as error:
            raise RunError(f"{place} has not answered {what} within {limit_s:.0f} s. {RESUMES}") from error
        except (tinker.TinkerError, RetryableException, ValueError, RuntimeError) as error:
            raise RunError(f"{place}: {what} failed: {error} {RESUMES}") from error

    def delete(self, path: str) -> None:
        """Delete a checkpoint at the server. A failure is only logged: nothing depends on the deletion."""
        self._tell(self.rest.delete_checkpoint_from_tinker_path(path), f"deleting {path}")

    def close(self) -> None:
        """End the session. Checkpoints stay. A failure is only logged: the models of an idle session need no memory."""
        self._tell(self.service.close("success"), "the end of the session")

    def _tell(self, future: Any, what: str) -> None:
        try:
            self.wait(future, what, limit_s=TELL_S)
        except RunError as error:
            logger.warning("%s", error)

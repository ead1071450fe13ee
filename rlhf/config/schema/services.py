"""Define how a run asks a service over HTTP: the address, the token's environment variable, and the limits."""

from __future__ import annotations

from typing import Annotated, Self
from urllib.parse import parse_qsl, urlsplit

from pydantic import AfterValidator, Field, model_validator

from rlhf.sections import Section
from rlhf.tracking.logs import is_secret_name


class HttpConfig(Section):
    """Requests to a service. A request is repeated after a network error or status 408, 425, 429 or 5xx."""

    timeout_s: float = Field(default=30.0, gt=0.0, le=86_400)
    """Time limit of one attempt, in seconds."""
    deadline_s: float = Field(default=300.0, gt=0.0, le=86_400)
    """Time limit of one request with all attempts, in seconds. A slower request counts as a failed reward. A slower
    request to a teacher ends the run."""
    max_in_flight: int = Field(default=32, ge=1, le=1024)
    """Largest number of requests that a worker has in flight."""

    @model_validator(mode="after")
    def _an_attempt_fits(self) -> Self:
        if self.timeout_s > self.deadline_s:
            raise ValueError(f"`timeout_s` {self.timeout_s:g} is above `deadline_s` {self.deadline_s:g}")
        return self


def _service(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.fragment:
        raise ValueError("the address must be http://HOST... or https://HOST...")
    if (
        parts.username
        or parts.password
        or any(name == "key" or is_secret_name(name) for name, _ in parse_qsl(parts.query))
    ):
        raise ValueError("`url` holds a secret, and the config is written to the run folder: use `token_env`")
    return url


ServiceUrl = Annotated[str, AfterValidator(_service)]
TokenEnv = Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*$")]

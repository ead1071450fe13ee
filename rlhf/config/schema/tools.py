"""Define the servers whose tools a model may call."""

from __future__ import annotations

import re
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from rlhf.sections import Section

VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")  # in the values of `env` and `headers`


def _without_secret(url: str) -> str:
    if "@" in urlsplit(url).netloc:
        why = "`url` holds a secret, and the config is written to the run folder"
        raise ValueError(f"{why}: leave out the user (servers of tools take `headers`)")
    return url


PublicUrl = Annotated[str, Field(pattern=r"^https?://[^/]+"), AfterValidator(_without_secret)]


class McpServerConfig(Section):
    """A server of the Model Context Protocol. Give exactly one of command and url."""

    command: tuple[str, ...] | None = Field(default=None, min_length=1)
    """A program with arguments, serving over standard input and output. Each conversation starts a separate process."""
    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the program, besides PATH, HOME, USER, LOGNAME, SHELL and TERM. `${NAME}` stands for the
    variable NAME of the command that starts the run."""
    url: PublicUrl | None = None
    """A server over streamable HTTP, shared by all conversations."""
    headers: dict[str, str] = Field(default_factory=dict)
    """HTTP headers of each request. `${NAME}` stands for a variable, as in `Authorization: "Bearer ${TOKEN}"`."""
    only: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Names of the tools to offer. null: all tools."""
    timeout_s: float = Field(default=30.0, gt=0.0, le=1_000_000)
    """Time limit of the server's start with the listing of the tools, and of each call, in seconds. A slower server
    counts as a failure; see reward_policy."""
    max_result_chars: int = Field(default=8000, ge=1, le=1_000_000)
    """Largest number of characters that the model reads of a result. A note replaces the rest."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.command is None) == (self.url is None):
            raise ValueError("give exactly one of `command` and `url`")
        if self.url is not None and self.env:
            raise ValueError("`env` has no effect with `url`: only a program has an environment; remove the key")
        if self.command is not None and self.headers:
            raise ValueError("`headers` has no effect with `command`; remove the key, or give the program an `env`")
        return self


class ToolsConfig(Section):
    """Tools for the model, besides the tools of an environment's class."""

    mcp: tuple[McpServerConfig, ...]
    """Servers of the Model Context Protocol. The names of all tools must differ."""

    @model_validator(mode="after")
    def _has_servers(self) -> Self:
        if not self.mcp:
            raise ValueError("`mcp` is empty; name a server, or leave `tools` out")
        return self

"""Find the programs and the secrets of a model's tool servers, before any actor starts."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from rlhf.config.schema.tools import VARIABLE, McpServerConfig, ToolsConfig
from rlhf.errors import UserError
from rlhf.rollouts.environments.tool_servers import ToolServer


def tool_servers(section: ToolsConfig | None, *, beside: Path, key: str) -> tuple[ToolServer, ...]:
    """Return the servers of a section, with the values of variables. UserError: a missing program or variable.

    beside: the folder searched for the files of a command before the current folder. key: the section's name.
    """
    if section is None:
        return ()
    return tuple(_server(server, beside, f"{key}.mcp.{place}") for place, server in enumerate(section.mcp))


def _server(server: McpServerConfig, beside: Path, key: str) -> ToolServer:
    return ToolServer(
        key=key,
        command=None if server.command is None else located(server.command, beside, f"{key}.command"),
        url=server.url,
        env=_filled(server.env, f"{key}.env"),
        headers=_filled(server.headers, f"{key}.headers"),
        timeout_s=server.timeout_s,
        only=server.only,
        max_result_chars=server.max_result_chars,
    )


def _filled(values: Mapping[str, str], key: str) -> dict[str, str]:
    for name, value in values.items():
        for variable in VARIABLE.findall(value):
            if not os.environ.get(variable):
                raise UserError(f"{key}.{name}: the environment variable {variable} is not set; export the variable")
    return {name: VARIABLE.sub(lambda match: os.environ[match[1]], value) for name, value in values.items()}


def located(command: Sequence[str], beside: Path, key: str) -> tuple[str, ...]:
    """Return a command with absolute paths for files, since the command starts in a different folder.

    UserError: no program. Links are kept, since the Python of a virtual environment finds packages by its link.
    """
    found = []
    for place, word in enumerate(command):
        paths = [folder / os.path.expanduser(word) for folder in (beside, Path.cwd())]
        is_path = os.sep in word or place > 0
        found.append(next((os.path.abspath(path) for path in paths if is_path and os.path.exists(path)), word))
    if shutil.which(found[0]) is None:
        raise UserError(f"{key}: there is no program {found[0]}; install the program, or write its path")
    return tuple(found)

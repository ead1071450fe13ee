"""Code on the pages works, as far as no training is needed: Python runs, YAML loads, JSON parses, commands exist.

`test_docs.py` reads the commands with `rlhf` and `make`. `test_extending.py` and `tests/integration/test_tutorial.py`
follow docs/extending.md and docs/tutorial.md step by step.
"""

from __future__ import annotations

import http.server
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import MagicMock, create_autospec

import pytest
import yaml

import rlhf
from rlhf.config.files.load import load
from rlhf.config.files.sweep import load_sweep
from tests.integration.recipes import merge

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^( *)```([^\n`]*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
FOLLOWED = {"extending.md", "tutorial.md"}
PAGES = [page for page in [*sorted((ROOT / "docs").glob("*.md")), *ROOT.glob("*.md")] if page.name not in FOLLOWED]
OF_OTHER_TOOLS = {"gcsFaultToleranceOptions": "KubeRay", "method": "a sweep of W&B"}  # by the first key
CODE = re.compile(r"[\w./-]+\.py(?=:\w)")
WORKING = [
    name
    for name in rlhf.__all__
    if name not in ("load_config", "load_merge", "load_service", "plan") and name.islower()
]
RUN: dict[str, Any] = {
    "run": {"name": "page"},
    "policy": {"model": "tiny:llama", "dtype": "float32"},
    "algorithm": {"name": "grpo"},
    "data": {"train": "prompts.jsonl", "max_prompt_tokens": 100},
    "rollouts": {"prompts_per_step": 8, "samples_per_prompt": 4, "max_new_tokens": 8},
    "rewards": {"right": {"function": "math_answer"}},
    "train": {"steps": 2, "lr": 1.0e-3, "sequences_per_update": 32},
}


class Block(NamedTuple):
    """A fenced block, and where it stands."""

    page: Path
    line: int
    kind: str
    text: str

    @property
    def file(self) -> str | None:
        """Return the file named in the block's first line."""
        named = re.match(r"# (\S+\.py)\n", self.text)
        return named[1] if named else None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(*kinds: str) -> list[Block]:
    """Return the blocks of all pages in the languages."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(page, line, match[2], textwrap.dedent(match[3])))
    return [block for block in found if not kinds or block.kind in kinds]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the recipes, where blocks run. Modules imported from the folder are forgotten."""
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def write_files(page: Path, folder: Path) -> None:
    """Write the files of a page."""
    for block in blocks("python"):
        if block.page == page and block.file:
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(block.text, encoding="utf-8")


def test_every_block_has_a_known_language() -> None:
    """A block in another language needs a test here."""
    assert {block.kind for block in blocks()} <= {"", "bash", "console", "json", "python", "yaml"}


def stand_in(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a call that checks the arguments and starts no work. The result has the attributes of a run."""

    def checked(*arguments: Any, **options: Any) -> Any:
        inspect.signature(call).bind(*arguments, **options)
        is_run = inspect.signature(call).return_annotation == "Run"
        return create_autospec(rlhf.Run, instance=True) if is_run else MagicMock(name=call.__name__)

    return checked


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_runs(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that train, serve or load a model only have their arguments checked."""
    for name in WORKING:
        monkeypatch.setattr(rlhf, name, stand_in(getattr(rlhf, name)))
    monkeypatch.setattr(http.server.ThreadingHTTPServer, "serve_forever", lambda server: server.server_close())
    monkeypatch.setattr(sys, "argv", ["page.py", "0"])
    write_files(block.page, folder)
    exec(compile(block.text, str(block), "exec"), {"__name__": "__main__"})


def whole(values: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with the keys of a part of it."""
    if "stages" in values and "policy" not in values:
        return {"base": "recipe:pipeline_rlhf", **values}
    if "base" in values or "stages" in values:
        return values
    rewards = values.get("rewards", RUN["rewards"])
    scored = {"reward": {"model": "runs/reward/final"}} if any("role" in reward for reward in rewards.values()) else {}
    return {**scored, **merge(RUN, values), "rewards": rewards}


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_loads(block: Block, folder: Path) -> None:
    """A part of a configuration is loaded within a small run, and a stage within the recipe of a pipeline."""
    values = yaml.safe_load(re.sub(r"^ *\.\.\.\n", "", block.text, flags=re.MULTILINE))
    if next(iter(values)) in OF_OTHER_TOOLS:
        return
    write_files(block.page, folder)
    for file in CODE.findall(block.text):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    path = folder / "page.yaml"
    kind = next((key for key in ("merge", "sweep", "service") if key in values), "run")
    path.write_text(yaml.safe_dump(values if kind != "run" else whole(values), sort_keys=False), encoding="utf-8")
    {"merge": rlhf.load_merge, "sweep": load_sweep, "service": rlhf.load_service, "run": load}[kind](path)


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json_parses(block: Block) -> None:
    """A block is one value, or a value on each line."""
    try:
        json.loads(block.text)
    except json.JSONDecodeError:
        for line in block.text.splitlines():
            json.loads(line)


@pytest.mark.parametrize("block", blocks("bash", "console"), ids=str)
def test_programs_of_this_repository_exist(block: Block) -> None:
    files = re.findall(r"(?<!\S)(?:python|\S*/bin/python|bash) ((?:[\w-]+/)+[\w.-]+\.(?:py|sh))", block.text)
    assert not [file for file in files if not (ROOT / file).is_file()]

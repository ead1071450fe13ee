"""A function's signature declares the arguments of a command."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest

from rlhf.commands import COMMANDS
from rlhf.commands.command import Command


def measure(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    steps: int | None = None,
    rate: float = 0.5,
    out_file: Path | None = None,
    names: Sequence[str] = (),
    device: Literal["cpu", "cuda"] = "cpu",
    quiet: bool = False,
    json_lines: bool = False,
    ready: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Measure a run. Return the arguments.

    Args:
        steps (STEP): the steps of
            at most 100 % of the run.
        names (NAME): a name.
    """
    return dict(locals())


def command(**changes: Any) -> Command:
    changes = {"ready": None, "json_lines": {"flag": "--json"}, **changes}
    return Command(measure, exclusive=("quiet", "json_lines"), changes=changes)


def parser(made: Command) -> argparse.ArgumentParser:
    built = argparse.ArgumentParser(prog="x", exit_on_error=False)
    made.add_arguments(built)
    return built


def test_a_signature_declares_the_arguments() -> None:
    made = command()
    words = ["a.yaml", "x=1", "--steps", "3", "--out-file", "f", "--names", "a", "--names", "b", "--device", "cuda"]
    given = made.call(parser(made).parse_args([*words, "--json"]), ready=None)
    texts = {"config": "a.yaml", "overrides": ["x=1"], "names": ["a", "b"], "device": "cuda", "out_file": Path("f")}
    assert given == texts | {"steps": 3, "rate": 0.5, "quiet": False, "json_lines": True, "ready": None}
    assert made.call(parser(made).parse_args(["b.yaml"]))["names"] == []
    assert made.call(parser(made).parse_args(["b.yaml"]), steps=9)["steps"] == 9


def test_the_docstring_and_the_defaults_explain_them() -> None:
    made = command(rate={"default": 0.25})
    text = " ".join(parser(made).format_help().split())
    assert made.summary == "Measure a run"
    assert "--steps STEP the steps of at most 100 % of the run --rate" in text
    assert "(default: 0.25)" in text
    assert "[--quiet | --json]" in text
    assert "CONFIG a YAML file" in text


def test_a_parameter_without_a_place_on_the_command_line_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"measure: ready has the type Callable\[\[\], None\] \| None"):
        parser(Command(measure))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_of_a_command_has_an_explanation(name: str) -> None:
    made = parser(COMMANDS[name])
    assert COMMANDS[name].summary
    assert [action.dest for action in made._actions if not action.help] == []
    lines = (inspect.getdoc(COMMANDS[name].function) or "").partition("Args:\n")[2].partition("\n\n")[0].split("\n")
    assert [line for line in lines if not re.match(r" {4}\w+( \(.+?\))?: | {8}|$", line)] == []  # shown in the help

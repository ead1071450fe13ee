"""Make a command of the command line from a function of the Python API.

The function's signature declares the arguments, and the docstring's section `Args:` explains the arguments. The module
of a command adds only the differences between the command and the call.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

Change: TypeAlias = Mapping[str, Any] | None  # keywords of argparse, and `flag` for another name; None: no argument
Container: TypeAlias = "argparse._ActionsContainer"

TYPES = {"str": str, "int": int, "float": float, "Path": Path, "AnyConfig": str}
TYPES |= {"str | Path": str, "str | PathLike[str]": str}
LIST = re.compile(r"(?:Sequence|tuple)\[(\w+)(?:, \.\.\.)?\]")
EXPLANATION = re.compile(r"^ {4}(\w+)(?: \((.+?)\))?: (.+(?:\n {8}.+)*)", re.MULTILINE)
SHARED = """
Args:
    config (CONFIG): a YAML file.
    overrides (key=value): set a key of the configuration.
    model (MODEL): a model folder, a hub name, the folder of a LoRA adapter, or the folder of a run.
    device: the device of the model.
    trust_remote_code: run Python code that comes with the model.
    quiet: show no progress.
    host: the address to listen on. Any address but a loopback address requires --token-env.
    port: the port to listen on; 0 takes a free port.
    token_env (NAME): the environment variable with the token that callers must give.
"""


@dataclass
class Command:
    """A command: a function of the Python API, a presenter of the result, and the differences of the command line."""

    function: Callable[..., Any]  # the parameters become arguments
    present: Callable[[argparse.Namespace], int | None] | None = None  # calls it, shows the result; the exit code
    add: Callable[[argparse.ArgumentParser], object] = lambda _: None  # adds arguments that are no parameters
    exclusive: Sequence[str] = ()  # parameters of which at most one may be given
    changes: Mapping[str, Change] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """Return the first sentence of the function's docstring."""
        return _docstring(self.function).split(". ")[0].split(".\n")[0].rstrip(".").replace("\n", " ")

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        add_parameters(parser, self.function, self.changes, exclusive=self.exclusive)
        self.add(parser)
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def run(self, args: argparse.Namespace) -> int:
        if self.present is not None:
            return self.present(args) or 0
        self.call(args)
        return 0

    def call(self, args: argparse.Namespace, **given: Any) -> Any:
        """Call the function with the parsed arguments, overridden by the given arguments."""
        parsed = {name: getattr(args, name) for name in inspect.signature(self.function).parameters if name in args}
        return self.function(**parsed | given)


def add_parameters(
    container: Container,
    function: Callable[..., Any],
    changes: Mapping[str, Change],
    *,
    exclusive: Sequence[str] = (),
    has_defaults: bool = True,
) -> None:
    """Declare the parameters of a function or a dataclass as arguments. Without `has_defaults` the default is None."""
    explanations = _explanations(SHARED) | _explanations(_docstring(function))
    group = container.add_mutually_exclusive_group() if exclusive else container
    for parameter in inspect.signature(function).parameters.values():
        change = changes.get(parameter.name, {})
        if change is None:
            continue
        parameter = parameter.replace(default=change.get("default", parameter.default))
        keywords = _keywords(parameter, *explanations.get(parameter.name, (None, ""))) | dict(change)
        if not {"type", "action", "choices"} & keywords.keys():
            where = f"{function.__name__}: {parameter.name}"
            raise TypeError(f"{where} has the type {parameter.annotation}, which no argument has")
        flag = keywords.pop("flag", None)
        if flag is None and _is_positional(parameter):
            container.add_argument(parameter.name, **keywords)
            continue
        keywords = {"default": parameter.default, **keywords, "dest": parameter.name}
        if not has_defaults:
            keywords["default"] = None
        place = group if parameter.name in exclusive else container
        place.add_argument(flag or f"--{parameter.name.replace('_', '-')}", **keywords)


def _is_positional(parameter: inspect.Parameter) -> bool:
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
        return False
    return parameter.default in (inspect.Parameter.empty, None, ())


def _keywords(parameter: inspect.Parameter, metavar: str | None, text: str) -> dict[str, Any]:
    kind, default = parameter.annotation.removesuffix(" | None"), parameter.default
    keywords: dict[str, Any] = {} if metavar is None else {"metavar": metavar}
    if kind == "bool":
        keywords["action"] = argparse.BooleanOptionalAction if default else "store_true"
    elif kind.startswith("Literal["):
        keywords["choices"] = ast.literal_eval(kind.removeprefix("Literal"))
    elif match := LIST.fullmatch(kind):
        keywords["type"] = TYPES[match[1]]
        keywords |= {"default": [], **({"nargs": "*"} if _is_positional(parameter) else {"action": "append"})}
    else:
        keywords |= {"type": TYPES[kind]} if kind in TYPES else {}  # a change gives another type
        if _is_positional(parameter) and default is None:
            keywords["nargs"] = "?"
    if isinstance(default, str | int | float) and not isinstance(default, bool):
        text += f" (default: {default:g})" if isinstance(default, float) else f" (default: {default})"
    return {**keywords, "help": text.replace("%", "%%")}


def _docstring(function: Callable[..., Any]) -> str:
    return inspect.getdoc(function) or ""


def _explanations(docstring: str) -> dict[str, tuple[str | None, str]]:
    """Return the placeholder and the explanation of each parameter in the section `Args:`."""
    section = docstring.partition("Args:\n")[2].partition("\n\n")[0]
    return {match[1]: (match[2], " ".join(match[3].split()).rstrip(".")) for match in EXPLANATION.finditer(section)}

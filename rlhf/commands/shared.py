"""Read the configuration of a call, write to stdout, and read typed lines, for all commands."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

from rlhf.errors import Interrupted, Preempted, UserError, known_error
from rlhf.extensions import refuse_start
from rlhf.passed_objects import forgotten_afterwards

if TYPE_CHECKING:
    from rich.table import Table

    from rlhf.config.files.load import LoadedConfig
    from rlhf.config.schema.root import Config

P = ParamSpec("P")
T = TypeVar("T")
AnyConfig: TypeAlias = "str | PathLike[str] | Mapping[str, Any] | Config | LoadedConfig"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Load a YAML file with `section.key=value` overrides. UserError names every mistake."""
    from rlhf.config.files.load import load

    refuse_other_than_file(path)
    return load(path, overrides)


def refuse_other_than_file(config: object, *, because: str = "") -> None:
    """Raise TypeError if the configuration of a call is not the path of a file. `because`: the reason, for the end."""
    if not isinstance(config, str | Path):
        raise TypeError(f"the configuration is of type {type(config).__name__}; give the path of a YAML file{because}")


def loaded_config(config: AnyConfig, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Return the checked configuration of a call: of a file, of a mapping with the same keys, or loaded before."""
    from rlhf.config.files.load import LoadedConfig, checked, from_mapping
    from rlhf.config.schema.root import Config

    if isinstance(config, str | PathLike):
        return load_config(fspath(config), overrides)
    if isinstance(config, Mapping):
        return from_mapping(config, overrides)
    if not isinstance(config, Config | LoadedConfig):
        fix = "give the path of a YAML file, a mapping with the same keys, or what rlhf.load_config returned"
        raise TypeError(f"the configuration is of type {type(config).__name__}; {fix}")
    if overrides:
        raise UserError(
            "overrides can change only a file or a mapping. Build the Config with the values that you want."
        )
    return checked(config) if isinstance(config, Config) else config


def config_or_name(target: AnyConfig, overrides: Sequence[str] = ()) -> LoadedConfig | str:
    """Return a configuration, or the name of a model or a function. UserError: overrides are given for a name."""
    from rlhf.config.files.recipes import PREFIX

    text = fspath(target) if isinstance(target, str | PathLike) else None
    if text is None or text.startswith(PREFIX) or text.endswith((".yaml", ".yml")):
        return loaded_config(target, overrides)
    if overrides:
        problem = f"{overrides[0]}: sets a key of a configuration, but {text} is neither a YAML file nor a recipe"
        raise UserError(f"{problem}. Give a CONFIG.yaml, or options such as --column prompt=question instead of keys.")
    return text


def model_name(model: str | PathLike[str] | None) -> str | None:
    """Return a model of a call as text, such as the folder of a run."""
    return None if model is None else fspath(model)


def run_folders(runs: str | PathLike[str] | Sequence[str | PathLike[str]]) -> list[Path]:
    """Return the folders of a run or of several runs."""
    return [Path(run) for run in ([runs] if isinstance(runs, str | PathLike) else runs)]


def starts_work(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a call that starts processes, jobs or long work, forbidden to code named in a configuration.

    The objects passed to the call are forgotten at the end. The error of a group of tasks becomes the error meant for
    the user. In a notebook, this error has no causes: IPython would show their tracebacks.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        from rlhf.tracking.notebook import in_notebook

        refuse_start(f"rlhf.{function.__name__}")
        try:
            with forgotten_afterwards():
                return function(*args, **kwargs)
        except (Interrupted, Preempted) as error:
            end: BaseException = error
        except Exception as error:
            if (known := known_error(error)) is None:
                raise
            end = known
        if in_notebook():
            end.__cause__ = end.__context__ = None
        raise end

    return call


def stoppable(function: Callable[P, T]) -> Callable[P, T]:
    @starts_work
    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        from rlhf.process.stopping import run_stoppable  # imports asyncio, and every reward process imports this module

        return run_stoppable(lambda _: function(*args, **kwargs))

    return call


def write_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def print_table(table: Table | None) -> None:
    from rich.console import Console

    if table is not None:
        Console().print(table)


def typed_lines() -> Iterator[str]:
    """Yield the lines of stdin except blank lines. A prompt is shown on a terminal."""
    is_terminal = sys.stdin.isatty()
    while True:
        if is_terminal:
            write_stdout("> ")
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")

"""The decoding of `rlhf generate` and `rlhf eval`: from options, or else from the settings of the model's
training run."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.commands.command import add_parameters
from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.data.templates import ChatTemplate
    from rlhf.evaluation.decoding import Decoding

RESOLVED = "config.resolved.yaml"
_OF_RUN = {"data": ("system_prompt", "apply_chat_template", "columns"), "rollouts": ("stop", "stop_token_ids")}
OF_SUITES = frozenset({"apply_chat_template", "chat_template", "template", "seed"})  # of a Decoding, for suites
_FLAGS = {"columns": "--column", "stop_token_ids": "--stop-token-id", "template": "--chat-template-kwargs"}


def add_decoding(parser: argparse.ArgumentParser) -> None:
    """Add the options of a Decoding. An omitted option stays None, for the settings of a run."""
    from rlhf.evaluation.decoding import Decoding

    changes: dict[str, Any] = {name: {"flag": flag} for name, flag in _FLAGS.items()}
    changes["columns"] |= {"action": "append", "type": _column}
    changes["template"] |= {"type": _template}
    add_parameters(parser.add_argument_group("decoding"), Decoding, changes, has_defaults=False)


def _template(text: str) -> ChatTemplate:
    from rlhf.data.templates import ChatTemplate

    try:
        kwargs = json.loads(text)
    except ValueError:
        kwargs = None
    if not isinstance(kwargs, dict):
        wanted = "a JSON object, such as '{\"enable_thinking\": false}'"
        raise argparse.ArgumentTypeError(f"is {text!r}, expected {wanted}")
    return ChatTemplate(kwargs=kwargs)


def _column(text: str) -> tuple[str, str]:
    column, equals, source = text.partition("=")
    if not (column and equals and source):
        raise argparse.ArgumentTypeError(f"is {text!r}, expected OURS=THEIRS, such as prompt=question")
    return column, source


def options_given(args: argparse.Namespace) -> dict[str, Any]:
    from rlhf.evaluation.decoding import Decoding

    values = {name: getattr(args, name) for name in inspect.signature(Decoding).parameters}
    given = {name: value for name, value in values.items() if value is not None}
    if "columns" in given:
        given["columns"] = dict(given["columns"])
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def option_of(name: str) -> str:
    return _FLAGS.get(name, f"--{name.replace('_', '-')}")


def refuse_options(given: Mapping[str, Any], configuration: str) -> None:
    """Raise UserError if an option of a Decoding is given, because a configuration sets the decoding."""
    for name in given:
        option = option_of(name)
        fix = "Set eval.temperature, eval.samples_per_prompt, rollouts.max_new_tokens and the like as key=value."
        raise UserError(f"{option} has no effect: {configuration} sets the decoding. {fix}")


def decoding_of(model: str, given: Mapping[str, Any], *, only: Collection[str] | None = None) -> Decoding:
    """Return the decoding of a model. Settings of the model's run, named on stderr, replace omitted options.

    only: the settings with an effect. None: all.
    """
    from rlhf.evaluation.decoding import Decoding

    options = dict(given)
    if options.get("system_prompt") == "":
        options["system_prompt"] = None
    file = _resolved(model)
    settings = {} if file is None else _settings(file)
    settings = {name: value for name, value in settings.items() if only is None or name in only}
    if options.get("apply_chat_template") is False:
        settings["system_prompt"] = None
    columns = {**settings.get("columns", {}), **options.get("columns", {})}
    usual = Decoding()
    taken = {name: value for name, value in settings.items() if name not in options and value != getattr(usual, name)}
    if taken:
        shown = ", ".join(f"{name} {json.dumps(value, ensure_ascii=False)}" for name, value in taken.items())
        sys.stderr.write(f"{model} is sampled with the settings of its run ({file}): {shown}. Options replace them.\n")
    return Decoding(**{**settings, **options, "columns": columns})


def _resolved(model: str) -> Path | None:
    """Return the configuration of a run from the run's folder or final/."""
    folder = Path(model).expanduser()
    folders = (folder, folder.parent) if folder.name == "final" else (folder,)
    return next((folder / RESOLVED for folder in folders if (folder / RESOLVED).is_file()), None)


def _settings(file: Path) -> dict[str, Any]:
    from rlhf.config.files.base_file import read_tree

    tree = read_tree(file).values
    settings: dict[str, Any] = {}
    for section, names in _OF_RUN.items():
        values = tree.get(section)
        if isinstance(values, dict):
            settings |= {name: values[name] for name in names if values.get(name) is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}

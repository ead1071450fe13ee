"""`rlhf recipes`: list the recipes of the library, and show the file of one."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf.commands.command import Command
from rlhf.commands.shared import write_stdout
from rlhf.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Describe one recipe. None: the planner needs the data or the model first, or nothing is trained."""

    name: str  # for `recipe:NAME`
    method: str  # the algorithms of the stages, in order
    model: str
    data: str
    devices: str | None
    memory_gib: float | None  # of this machine, or of the fullest GPU
    minutes: float | None  # of all training steps, as `rlhf plan` predicts for these devices


def recipes() -> tuple[Recipe, ...]:
    """List the recipes of the library: method, model, data, and what `rlhf plan` predicts of memory and time.

    Recipes for CPUs are planned on the CPUs of this machine, recipes for GPUs on h100 or h200.
    """
    from rlhf.config.files.recipes import RECIPES, recipe_names

    return tuple(_described(name, RECIPES / f"{name}.yaml") for name in recipe_names())


def show_recipe(name: str) -> str:
    """Return the text of a recipe's file. UserError: there is no recipe of this name."""
    from rlhf.config.files.recipes import PREFIX, config_file

    return config_file(f"{PREFIX}{name.removeprefix(PREFIX)}").read_text(encoding="utf-8")


def _described(name: str, file: Path) -> Recipe:
    from rlhf.config.derive import train_sets
    from rlhf.config.files.base_file import read_tree
    from rlhf.config.files.load import load, load_merge_file
    from rlhf.config.files.sweep import load_sweep
    from rlhf.planning.whole_run import totals

    values = read_tree(file).values
    if "merge" in values:
        merge = load_merge_file(file)
        model = " + ".join(_last(source.model) for source in merge.models.values())
        method = f"merge ({merge.method})"
        return Recipe(name=name, method=method, model=model, data="-", devices=None, memory_gib=None, minutes=None)
    loaded = load_sweep(file).base if "sweep" in values else load(file)
    runs = loaded.runs.values()
    sets = dict.fromkeys(_named(weighted.source) for config in runs for weighted in train_sets(config).values())
    method = " > ".join(config.algorithm.name for config in runs)
    needs = totals(loaded)
    return Recipe(
        name=name,
        method=f"sweep of {method}" if "sweep" in values else method,
        model=_last(next(iter(runs)).policy.model),
        data=next(iter(sets)) + (f" + {len(sets) - 1} more" if len(sets) > 1 else ""),
        devices=needs.devices,
        memory_gib=needs.memory_gib,
        minutes=None if "sweep" in values else needs.minutes,  # a sweep's time depends on the trials at once
    )


def _named(source: object) -> str:
    return source if isinstance(source, str) else str(getattr(source, "task", source))


def _last(model: str) -> str:
    return model.rpartition("/")[2]


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", nargs="?", choices=["show"], help="print the file of a recipe instead")
    parser.add_argument("name", metavar="NAME", nargs="?", help="the name of a recipe")


def _present(args: argparse.Namespace) -> None:
    if args.action is not None:
        if args.name is None:
            raise UserError("recipes show: needs the NAME of a recipe; `rlhf recipes` lists all names")
        write_stdout(show_recipe(args.name))
        return
    from rlhf.planning.summary import format_table

    rows = [["recipe", "method", "model", "data", "on", "GiB", "minutes"]]
    for recipe in COMMAND.call(args):
        needs = ["-" if n is None else f"{n:,.{1 if n < 10 else 0}f}" for n in (recipe.memory_gib, recipe.minutes)]
        rows.append([recipe.name, recipe.method, recipe.model, recipe.data, recipe.devices or "-", *needs])
    write_stdout(
        f"{format_table(rows)}\n\n"
        "GiB: memory of this machine or of the fullest GPU. Minutes: all training steps, without start and "
        "evaluations. `rlhf plan recipe:NAME` shows how both are predicted.\n"
        "Run one with `rlhf train recipe:NAME`, read it with `rlhf recipes show NAME`.\n"
    )


COMMAND = Command(recipes, _present, add=_add)

"""Find the recipes of the installed library by name. In the repository, rlhf/recipes is a link to configs/."""

from __future__ import annotations

from pathlib import Path

from rlhf.config.mistakes.suggestions import nearest
from rlhf.errors import UserError

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
PREFIX = "recipe:"


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def config_file(path: str | Path) -> Path:
    """Return the path of a file, or the file of `recipe:NAME`. UserError: there is none."""
    text = str(path)
    if text.startswith(PREFIX):
        return _recipe(text)
    if Path(path).exists():
        return Path(path)
    stem = Path(path).stem
    hint = f"; `{PREFIX}{stem}` is a recipe of the library" if stem in recipe_names() else ""
    raise UserError(f"{text}: no such config file{hint}")


def _recipe(text: str) -> Path:
    name, names = text.removeprefix(PREFIX), recipe_names()
    if name in names:
        return RECIPES / f"{name}.yaml"
    close = nearest(name, names)
    hint = f"did you mean {PREFIX}{close}? " if close is not None else ""
    raise UserError(f"{text}: there is no recipe of this name; {hint}`rlhf recipes` lists all recipes")

"""Find the recipes of the installed library. In the repository, rlhf/recipes is a link to configs/."""

from __future__ import annotations

import logging
from pathlib import Path

from rlhf.config.mistakes.suggestions import nearest
from rlhf.errors import UserError

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
logger = logging.getLogger(__name__)


def config_file(path: str | Path) -> Path:
    """Return the path, or for a bare name without a file in this folder the recipe of this name. UserError: neither."""
    path = Path(path)
    if path.parent != Path() or path.exists():
        return path
    recipe = RECIPES / path.name
    if recipe.is_file():
        logger.warning("there is no %s in this folder: the recipe %s is used", path, recipe)
        return recipe
    close = nearest(path.name, sorted(file.name for file in RECIPES.glob("*.yaml")))
    hint = f"; did you mean the recipe {close}?" if close is not None else ""
    raise UserError(f"{path}: no such config file, and {RECIPES} has no recipe of that name{hint}")

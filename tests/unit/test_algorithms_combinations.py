"""docs/algorithms.md says which algorithms on rollouts can be combined with what: as loading a configuration does."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from rlhf.algorithms import ALGORITHMS
from rlhf.algorithms.algorithm import OnlineKind
from rlhf.config.files.base_file import read_tree
from rlhf.config.files.load import load
from rlhf.errors import UserError
from tests.integration.recipes import merge

ROOT = Path(__file__).parents[2]
NAMES = [name for name, one in ALGORITHMS.items() if one.config_class().kind in get_args(OnlineKind)]
BASE: Mapping[str, Any] = {
    "run": {"name": "x"},
    "policy": {"model": "tiny:llama", "dtype": "float32"},
    "data": {"train": "rows.jsonl", "max_prompt_tokens": 64},
    "rollouts": {"prompts_per_step": 8, "samples_per_prompt": 6, "max_new_tokens": 64},
    "rewards": {"a": {"function": "last_number"}, "b": {"function": "math_answer"}},
    "train": {"steps": 4, "lr": 1e-4, "sequences_per_update": 8, "max_tokens_per_microbatch": 4096},
}
GAME = {"name": "guess_number", "args": {"low": 1, "high": 7}, "max_turns": 3, "max_tokens": 250}
PLAYED = {"rollouts": {"environment": GAME}, "rewards": {"a": {"function": None, "environment": True}}}
NEEDS: Mapping[str, dict[str, Any]] = {
    "gigpo": PLAYED,
    "topr": {"algorithm": {"correction": None}},
    "oapl": {"algorithm": {"correction": None}},
    "on_policy_distillation": {"teacher": {"model": "tiny:llama"}, "algorithm": {"on_policy_share": None}},
}
COLUMNS: Mapping[str, list[dict[str, Any]]] = {  # any of these changes
    "streamed": [{"train": {"streamed": True}}, {"train": {"streamed": True, "sequences_per_update": 16}}],
    "older weights": [
        {"rollouts": {"max_staleness": 1}},
        {"rollouts": {"max_staleness": 1}, "algorithm": {"correction": "none"}},
    ],
    "environment": [PLAYED],
    "agent": [
        {"rollouts": {"environment": None, "agent": {"function": "a.py:run", "max_calls": 3, "max_tokens": 250}}}
        | {"rewards": {"a": {"function": "last_number", "environment": None}}}
    ],
    "credit: step": [{"rewards": {"a": {"function": "a.py:run", "environment": None, "credit": "step"}}}],
    "mask_truncated": [{"algorithm": {"mask_truncated": True}}],
    "length_penalty": [{"algorithm": {"length_penalty": {"by": "band", "start": 4, "end": 8}}}],
    "keep_per_prompt": [{"rollouts": {"keep_per_prompt": {"count": 5, "by": "best"}}}],
    "correction": [
        {"algorithm": {"correction": {"preset": "token_tis"}}},
        {"algorithm": {"correction": {"preset": "bypass_pg_is"}}},
    ],
    "support_replay": [{"policy": {"support_replay": True}, "rollouts": {"top_k": 8}}],
}


def table() -> dict[str, list[str]]:
    page = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8").partition("## What can be combined\n")[2]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", page.partition("\n## ")[0], re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in rows}


def test_every_algorithm_on_rollouts_has_a_row() -> None:
    assert list(table()) == NAMES


def row(name: str, path: Path) -> list[str]:
    """Return "yes" for each column with a change that loads."""

    def loads(tree: Mapping[str, Any]) -> bool:
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        try:
            load(path)
        except UserError:
            return False
        return True

    recipe = {"on_policy_distillation": "on_policy_distill"}.get(name, name)
    section = read_tree(ROOT / "configs" / f"{recipe}_smollm2.yaml").values["algorithm"]
    tree = merge(merge(BASE, {"algorithm": section}), NEEDS.get(name, {}))
    assert loads(tree)
    return ["yes" if any(loads(merge(tree, change)) for change in changes) else "" for changes in COLUMNS.values()]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_row_is_what_a_configuration_allows(name: str, tmp_path: Path) -> None:
    assert table()[name] == row(name, tmp_path / "run.yaml")

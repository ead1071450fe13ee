"""Every recipe loads, and `rlhf plan` accepts the recipe on a machine without the model and the devices."""

from __future__ import annotations

from pathlib import Path

import pytest

import rlhf
from rlhf.config.files.base_file import read_tree

FILES = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
RECIPES = [path for path in FILES if read_tree(path).values.keys().isdisjoint({"merge", "sweep"})]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe_loads_and_plans(path: Path) -> None:
    loaded = rlhf.load_config(path)
    text = rlhf.plan(loaded)
    assert all(name in text for name in loaded.stages)


def test_recipes_have_names_of_their_own() -> None:
    names = [rlhf.load_config(path).name for path in RECIPES]
    assert len(set(names)) == len(names) == len(RECIPES) > 0


def test_a_cluster_of_the_recipe_s_size_is_enough() -> None:
    by_name = {path.stem: path for path in RECIPES}
    assert "8" in rlhf.plan(by_name["ppo_7b_8gpu"], cluster="1*cpu=64,gpu=8")
    rlhf.plan(by_name["ppo_70b_multinode"], cluster="4*cpu=96,gpu=8")


@pytest.mark.parametrize(
    ("name", "cluster"),
    [
        ("grpo_qwen3_30b_a3b_8gpu", "1*cpu=128,gpu=8,type=h100,mem=2000"),
        ("grpo_qwen3_235b_a22b_multinode", "8*cpu=128,gpu=8,type=h200,mem=2000"),
    ],
)
def test_a_mixture_fits_its_nodes(name: str, cluster: str) -> None:
    text = rlhf.plan(FILES[0].with_name(f"{name}.yaml"), cluster=cluster)
    places = [line for line in text.splitlines() if line.startswith(("  GPU of ", "  host of "))]
    assert len(places) > 2
    assert all(" fits " in line for line in places), text

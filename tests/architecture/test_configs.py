"""Every recipe loads. The recipes of runs plan on any machine, and every trial of a sweep is a run.
Planning imports nothing heavy.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.config.files.base_file import read_tree
from rlhf.config.files.dump import dump_yaml
from rlhf.config.files.load import load, load_merge_file
from rlhf.config.files.sweep import load_sweep
from rlhf.planning.report import render_plan
from rlhf.sweeps.space import known_trials

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.glob("**/*.yaml"))
MERGES = [path for path in FILES if "merge" in read_tree(path).values]
SWEEPS = [path for path in FILES if "sweep" in read_tree(path).values]
RECIPES = [path for path in FILES if path not in (*MERGES, *SWEEPS)]


def test_there_are_recipes() -> None:
    names = {path.name for path in RECIPES}
    assert names >= {"quickstart.yaml", "quickstart_grpo.yaml", "ppo_smollm2.yaml", "grpo_smollm2.yaml"}
    assert "merge_ties.yaml" in {path.name for path in MERGES}
    assert "sweep_tiny.yaml" in {path.name for path in SWEEPS}
    assert len({read_tree(path).values["run"]["name"] for path in RECIPES}) == len(RECIPES)


@pytest.mark.parametrize("path", MERGES, ids=lambda path: path.name)
def test_a_merge_loads(path: Path) -> None:
    assert load_merge_file(path).out


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_a_sweep_loads_with_all_its_trials(path: Path) -> None:
    sweep = load_sweep(path)
    known_trials(sweep)
    assert sweep.judged in sweep.base.runs


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_plans_and_resolves(path: Path, tmp_path: Path) -> None:
    loaded = load(path)
    text = render_plan(loaded)
    assert text.startswith(loaded.name)
    assert all(name in text for name in loaded.stages)
    resolved = tmp_path / "config.resolved.yaml"
    resolved.write_text(dump_yaml(loaded))
    assert dict(load(resolved).stages) == dict(loaded.stages)
    if "gpu" not in path.name and "multinode" not in path.name:
        render_plan(loaded, cluster="cpu=2")  # on a laptop's two cores


@pytest.mark.parametrize(
    ("name", "cluster"),
    [
        ("ppo_7b_8gpu", "1*cpu=64,gpu=8"),
        ("ppo_70b_multinode", "4*cpu=96,gpu=8"),
        ("grpo_qwen3_30b_a3b_8gpu", "1*cpu=128,gpu=8,type=h100,mem=2000"),
        ("grpo_qwen3_235b_a22b_multinode", "8*cpu=128,gpu=8,type=h200,mem=2000"),
    ],
)
def test_a_large_recipe_fits_its_nodes(name: str, cluster: str) -> None:
    text = render_plan(load(CONFIGS / f"{name}.yaml"), cluster=cluster)
    if "mem=" in cluster:
        places = [line for line in text.splitlines() if line.startswith(("  GPU of ", "  host of "))]
        assert len(places) > 2
        assert all(" fits " in line for line in places), text


def cpu_seconds(code: str) -> float:
    """Return the processor time of a new interpreter, with start and all imports."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_a_70b_model_on_many_nodes_is_planned_in_twice_the_time_of_importing_torch() -> None:
    """An idle laptop imports torch in a second. A busy machine slows both, so the test compares ratios."""
    cluster = "4*cpu=96,gpu=8,type=h100,mem=1000,price=98"
    plan = cpu_seconds(f"import rlhf; rlhf.plan({str(CONFIGS / 'ppo_70b_multinode.yaml')!r}, cluster={cluster!r})")
    assert plan < 2.0 * cpu_seconds("import torch")

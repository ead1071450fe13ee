"""A mixture of experts and a hybrid learn the quickstart's task in the quickstart's pipeline, with the real engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.recipes import rows, train
from tests.tiny_learners import build_tiny_hybrid, build_tiny_mixture

RECIPE = Path(__file__).parents[2] / "configs" / "quickstart_grpo.yaml"


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("build", [build_tiny_mixture, build_tiny_hybrid])
def test_an_architecture_learns_by_grpo(build: Callable[[Path], Path], tmp_path: Path) -> None:
    changes = [f"policy.model={build(tmp_path / 'model')}", f"run.dir={tmp_path}", "run.name=learns"]
    balance = ["policy.router_balance_coef=0.001"] if build is build_tiny_mixture else []
    config = tmp_path / "run.yaml"
    config.write_bytes(RECIPE.read_bytes())
    train(config, "--quiet", *changes, *balance, timeout_s=900.0)
    scores = [row["eval/heldout/score"] for row in rows(tmp_path / "learns" / "grpo") if "eval/heldout/score" in row]
    assert scores[-1] >= scores[0] + 0.3, json.dumps(scores)

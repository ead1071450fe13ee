"""Suites over the real front: of a model on disk, of two models, and during a run with the weights of each step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import rlhf
from rlhf.models.files.tiny import ASSISTANT, EOS
from rlhf.suites.reasoning import REASONING_SUITES, reasoning_rows
from tests.integration.games import chain, samples
from tests.integration.recipes import train_here, write_config

SUITE = "reasoning-basic"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_suite_finds_what_is_known_of_two_models(tiny_model: Path, tmp_path: Path, ray_local: None) -> None:
    """One model always answers 2, and the other always 9. Each is right where this is the answer."""
    rows = [row for row in reasoning_rows(SUITE) if row["task"] == "reasoning_gym/gcd"]
    per_task = max(i for i, row in enumerate(rows) if row["answer"] == "2") + 1
    models = [chain(tiny_model, tmp_path / f"says_{digit}", {ASSISTANT: digit, digit: EOS}) for digit in ("2", "9")]
    told = rlhf.evaluate(
        str(models[0]), suites=[SUITE], suite_limit=per_task, against=str(models[1]), out=tmp_path / "out"
    )
    reports = {report.name: report for report in told.sets}
    gcd = reports[f"{SUITE}.gcd"]
    answers = [row["answer"] for row in rows[:per_task]]
    assert gcd.num_rows == per_task
    assert gcd.metrics["score"].value == pytest.approx(answers.count("2") / per_task, abs=0.02)
    assert gcd.against is not None
    assert gcd.against["score"].value == pytest.approx(answers.count("9") / per_task, abs=0.02)
    assert gcd.metrics["better"].value > 0.5
    assert reports[SUITE].num_rows == per_task * len(REASONING_SUITES[SUITE])
    written = lines(tmp_path / "out" / "samples.jsonl")
    assert len(written) == 2 * reports[SUITE].num_rows
    assert {(row["model"], row["response"]) for row in written} == {(str(models[0]), "2"), (str(models[1]), "9")}
    assert [row["target"] for row in written if row["task"] == "gcd"][:per_task] == answers
    assert not list((tmp_path / "out").glob("suite_answers_*"))


def test_a_run_asks_a_suite_with_the_weights_of_the_step(tmp_path: Path, ray_local: None) -> None:
    """The answers after the last step are those of the written model, and differ from the answers before training."""
    changes = {
        "run": {"name": "suited", "dir": str(tmp_path)},
        "algorithm": {"name": "grpo"},
        "data": {"eval": None},
        "rewards": {"digits": {"function": "format_regex", "args": {"pattern": "(?s).*[0-9].*"}}},
        "train": {"steps": 2, "lr": 1e-2},
        "eval": {"suites": [SUITE], "suite_limit": 1},
    }
    train_here(write_config(tmp_path / "suited.yaml", changes))
    run = tmp_path / "suited"
    scores = {row["step"]: row.get(f"eval/{SUITE}/score") for row in lines(run / "metrics.jsonl")}
    assert scores[0] is not None
    assert scores[2] is not None
    report = json.loads((run / "evals" / "step_000002.json").read_text())["sets"]
    assert report[SUITE]["num_rows"] == len(REASONING_SUITES[SUITE])
    asked = {step: [row for row in samples(run, step) if row["split"] == SUITE] for step in (0, 2)}
    rlhf.evaluate(str(run), suites=[SUITE], suite_limit=1, out=tmp_path / "out")
    written = [row["response"] for row in lines(tmp_path / "out" / "samples.jsonl")]
    assert [row["response"] for row in asked[2]] == written
    assert [row["response"] for row in asked[0]] != written

"""Real runs are rewarded by a rubric, by comparisons within groups, and by an ensemble of reward models."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.services import JudgeService, served
from tests.integration.recipes import rows, train, train_here, write_config
from tests.integration.test_reward_services import running, wait_for_url

JUDGE: dict[str, Any] = {"model": "judge", "samples": 2, "request": {"temperature": 1.0}}


def config_of(folder: Path, name: str, source: dict[str, Any], **changes: Any) -> Path:
    run = {"run": {"name": name, "dir": str(folder)}, "algorithm": {"name": "grpo"}}
    small = {"train": {"steps": 2, "checkpoint_every": 1}, "rollouts": {"prompts_per_step": 4}}
    return write_config(folder / f"{name}.yaml", {**run, **small, "rewards": {"quality": source}, **changes})


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted((folder / "samples").iterdir()) for line in path.open()]


def test_a_run_is_rewarded_by_a_rubric_and_asks_nothing_twice(tmp_path: Path, kept_engines: None) -> None:
    judge = JudgeService()
    rubric = {
        "agrees": {"criterion": "Agrees with {answer}.", "weight": 2},
        "clear": {"criterion": "Is clear.", "scale": [1, 3]},
        "brief": {"function": "length_penalty", "args": {"limit": 100, "unit": "characters"}},
    }
    with served(judge) as url:
        config = config_of(tmp_path, "rubric", {"url": url, "judge": {**JUDGE, "rubric": rubric}})
        train_here(config, "--until", "1")
        first = len(judge.bodies)
        train_here(config, "--resume", "auto")
    folder = tmp_path / "rubric"
    assert 0 < first < len(judge.bodies)
    found = rows(folder)
    assert [row["step"] for row in found] == [0, 1, 2]
    for row in found[1:]:
        assert (
            -1 <= row["rewards/quality/criterion/brief/mean"] <= 0 <= row["rewards/quality/criterion/agrees/mean"] <= 1
        )
        assert 0 <= row["rewards/quality/agreement/mean"] <= 1
    assert {"eval/heldout/quality/criterion/agrees", "eval/heldout/quality"} <= found[0].keys()
    for sample in samples(folder):
        agrees, clear, brief = (sample["scores"][f"quality/criterion/{name}"] for name in rubric)
        assert sample["score"] == pytest.approx((2 * agrees + clear + brief) / 4)
    asked = [json.dumps(body, sort_keys=True) for body in judge.bodies]
    assert max(map(asked.count, asked)) <= 2  # the two repeats of a question
    assert (folder / "judgements" / "worker_0.jsonl").read_text().count("\n") == len(asked)


def test_a_run_is_rewarded_by_comparisons_within_its_groups(tmp_path: Path, ray_local: None) -> None:
    judge = JudgeService()
    with served(judge) as url:
        wins = {"url": url, "judge": {"model": "judge", "compare": "bradley_terry", "opponents": 2, "samples": 2}}
        correct = {"correct": {"function": "last_number", "weight": 0.0}, "quality": wins}
        sampled = {"samples_per_prompt": 2, "temperature": 1.0, "every": 2}
        train_here(config_of(tmp_path, "wins", wins, rewards=correct, eval=sampled))
    for row in rows(tmp_path / "wins"):
        if row["step"]:
            assert row["rewards/quality/mean"] == pytest.approx(0.5, abs=1e-6)
            assert 0 <= row["rewards/quality/agreement/mean"] <= 1
            assert row["rewards/score/std"] > 0.01


@pytest.fixture(scope="module")
def reward_models(tmp_path_factory: pytest.TempPathFactory, ray_local: None) -> list[Path]:
    """Two reward models with different heads, on the tiny model of the runs."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from rlhf.models.files.tiny import build_tiny_llama

    folder = tmp_path_factory.mktemp("ensemble")
    base = build_tiny_llama(folder / "base", seed=0)
    made = []
    for seed in range(2):
        torch.manual_seed(seed)
        path = folder / f"reward-{seed}"
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).save_pretrained(path)
        AutoTokenizer.from_pretrained(base).save_pretrained(path)
        made.append(path)
    return made


def test_a_run_is_rewarded_by_an_ensemble(tmp_path: Path, ray_local: None, reward_models: list[Path]) -> None:
    one, two = map(str, reward_models)
    members = {"b": {"model": two}}
    reward = {"model": one, "dtype": "float32", "disagreement_coef": 0.5, "members": members}
    train_here(config_of(tmp_path, "ensemble", {"role": "reward"}, reward=reward))
    folder = tmp_path / "ensemble"
    for row in rows(folder)[1:]:
        assert row["rewards/quality/disagreement/mean"] > 0
    assert all(sample["scores"]["quality/disagreement"] >= 0 for sample in samples(folder))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_judge_trained_on_preferences_rewards_the_groups_of_another_run(tmp_path: Path) -> None:
    """The task `comparisons` trains a judge, `rlhf serve` serves the judge, and a run compares its responses by it."""
    data = {"task": "comparisons", "size": 16, "args": {"data": {"task": "running_totals", "size": 40}}}
    changes = {
        "run": {"name": "judge", "dir": str(tmp_path)},
        "algorithm": {"name": "grpo"},
        "data": {"train": data, "eval": None, "apply_chat_template": None, "max_prompt_tokens": 600},
        "rollouts": {"prompts_per_step": 4},
        "train": {"steps": 1, "checkpoint_every": 1, "max_tokens_per_microbatch": 2048},
        "rewards": {"correct": {"function": "multiple_choice"}},
        "eval": None,
    }
    train(write_config(tmp_path / "judge.yaml", changes))
    assert {sample["columns"]["answer"] for sample in samples(tmp_path / "judge")} == {"A", "B"}
    port, log = "18741", tmp_path / "serve.log"
    words = [sys.executable, "-m", "rlhf.cli", "serve", str(tmp_path / "judge"), "--name", "judge", "--port", port]
    with running(words, log, OMP_NUM_THREADS="1") as process:
        wait_for_url(f"http://127.0.0.1:{port}/v1/models", process, log, timeout_s=300)
        choice = {"max_tokens": 16, "temperature": 0.0, "structured_outputs": {"choice": ["Answer: A", "Answer: B"]}}
        judge = {"model": "judge", "compare": "win_rate", "opponents": 2, "samples": 2, "request": choice}
        wins = {"url": f"http://127.0.0.1:{port}/v1", "judge": judge, "http": {"timeout_s": 60.0}}
        train(config_of(tmp_path, "wins", wins, data={"eval": None}, eval=None, train={"steps": 1}))
    (row,) = rows(tmp_path / "wins")
    assert row["rewards/errors/total"] == 0
    assert row["rewards/quality/mean"] == pytest.approx(0.5)
    assert 0 <= row["rewards/quality/agreement/mean"] <= 1

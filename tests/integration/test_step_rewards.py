"""A whole run with rewards of single steps: of a conversation's turns, by a function, and by a process reward model."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.models.files.tiny import build_tiny_llama
from tests.integration.games import GAME, samples
from tests.integration.recipes import ONLINE, merge, rows, train, write_config

STEPS = Path(__file__).parents[1] / "fixtures" / "rewards" / "steps.py"
HAGGLE = '''
class Haggle:
    """Every turn earns the share of its characters that are digits; the third ends it."""

    def reset(self, seed, secret=None):
        self.turn = 0

    def step(self, response):
        self.turn += 1
        return "go on", sum(map(str.isdigit, response)) / max(1, len(response)), self.turn == 3
'''


@pytest.fixture(scope="module")
def process_reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with an untrained head of one label."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tiny = build_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", seed=0)
    folder = tmp_path_factory.mktemp("process")
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


def config(folder: Path, name: str, model: Path, algorithm: dict[str, Any]) -> Path:
    (folder / "haggle.py").write_text(HAGGLE)
    changes = {
        "run": {"name": name, "dir": str(folder), "seed": 3},
        "algorithm": algorithm,
        "rollouts": {"environment": {"name": "haggle.py:Haggle", "args": None, "max_tokens": 96}, "max_new_tokens": 6},
        "rewards": {
            "won": {"environment": True, "credit": "step"},
            "digits": {"function": f"{STEPS}:digits", "credit": "step", "weight": 0.1},
            "sound": {"role": "reward", "credit": "step", "weight": 0.5},
            "short": {"function": "length_penalty", "args": {"limit": 60, "unit": "characters"}},
        },
        "reward": {"model": str(model), "dtype": "float32", "steps": {"separator": "1"}},
        "tracking": {"samples_per_step": 32},
        "train": {"steps": 2},
    }
    base = merge(merge(ONLINE, {"data": {"apply_chat_template": None, "eval": None}, "eval": None}), GAME)
    return write_config(folder / f"{name}.yaml", merge(changes, {"data": {"eval": None}}), base=base | {"rewards": {}})


def normalised(values: list[float]) -> list[float]:
    found = torch.tensor(values, dtype=torch.float64)
    return ((found - found.mean()) / (found.std() + 1e-6)).tolist()


def check_grpo(found: list[dict[str, Any]]) -> None:
    """Every token's advantage in the samples, out of the steps in the samples."""
    assert len(found) == 32
    for _, members in groupby(found, key=lambda sample: sample["group_id"]):
        group = list(members)
        whole = normalised([sample["scores"]["short"] for sample in group])
        credited: list[list[tuple[int, float]]] = [[] for _ in group]
        for name, weight in (("won", 1.0), ("digits", 0.1), ("sound", 0.5)):
            flat = [(place, step) for place, sample in enumerate(group) for step in sample["steps"][name]]
            terms = normalised([step["value"] for _, step in flat]) if len(flat) > 1 else [0.0] * len(flat)
            for (place, step), term in zip(flat, terms, strict=True):
                credited[place].append((step["end"], weight * term))
        for sample, score, steps in zip(group, whole, credited, strict=True):
            tokens = sample["tokens"]
            for place, (sampled, advantage) in enumerate(zip(tokens["sampled"], tokens["advantages"], strict=True)):
                expected = score + sum(term for end, term in steps if end >= place)
                assert advantage == (pytest.approx(expected, abs=2e-4) if sampled else None)


def check_ends(sample: dict[str, Any]) -> None:
    """Check the ends of steps: a turn's step at the turn's last token, a digit's step at the digit."""
    sampled, texts, steps = sample["tokens"]["sampled"], sample["tokens"]["texts"], sample["steps"]
    last = [place for place in range(len(sampled)) if sampled[place] and not any(sampled[place + 1 : place + 2])]
    assert [step["end"] for step in steps["won"]] == last
    assert sum(step["value"] for step in steps["won"]) == pytest.approx(sample["scores"]["won"])
    digits = [one for one in sample["response"] if one in "0123456789"]
    assert [step["value"] for step in steps["digits"]] == [float(one) for one in digits]
    for one, step in zip(digits, steps["digits"], strict=True):  # the step of a final digit ends at the last token
        assert sampled[step["end"]]
        assert one in texts[step["end"]] or step["end"] == last[-1]
    assert steps["sound"][-1]["end"] == last[-1]
    assert all(0.0 < step["value"] < 1.0 for step in steps["sound"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tokens_are_credited_with_their_own_steps(tmp_path: Path, process_reward_model: Path) -> None:
    """GRPO's advantages come from three rewards by steps and a reward of the response."""
    train(config(tmp_path, "steps", process_reward_model, {"name": "grpo"}))
    run = tmp_path / "steps"
    row = rows(run)[-1]
    assert row["rewards/won/steps/mean"] == row["rollouts/turns/mean"]
    assert row["rewards/won/step/mean"] * row["rewards/won/steps/mean"] == pytest.approx(row["rewards/won/mean"])
    assert row["rewards/sound/step/std"] > 0.0
    for step in (1, 2):
        found = samples(run, step)
        check_grpo(found)
        for sample in found:
            check_ends(sample)

"""The README.md of a trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from rlhf.config.files.load import load
from rlhf.config.schema.root import Config
from rlhf.tracking.run_folder.atomic import write_lines
from rlhf.viewing.model_card import model_card, write_model_card


def config_of(folder: Path, **sections: Any) -> Config:
    tree = {
        "run": {"name": "demo"},
        "policy": {"model": "org/base", "revision": "v2"},
        "algorithm": {"name": "dpo"},
        "data": {"train": "org/pairs"},
        "train": {"steps": 3, "lr": 1e-3, "sequences_per_update": 4},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(tree | sections))
    (config,) = load(path).runs.values()
    return config


def front_matter(card: str) -> dict[str, Any]:
    _, text, _ = card.split("---\n", 2)
    values: dict[str, Any] = yaml.safe_load(text)
    return values


def test_the_card_names_base_method_data_settings_and_the_metrics_of_its_step(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "time_s": 1.0, "update/loss/mean": 0.7, "eval/held_out/accuracy": 0.5},
        {"step": 2, "time_s": 2.0, "update/loss/mean": 0.25, "preference/accuracy/mean": None},
        {"step": 3, "time_s": 3.0, "update/loss/mean": 0.125},
    ]
    write_lines(tmp_path / "metrics.jsonl", rows)
    warm_ups = {"warmup_steps": (3, "3 steps"), "warmup_ratio": (0.1, "0.1 of all steps")}
    for key, (value, shown) in warm_ups.items():
        train = {"steps": 40, "lr": 1e-3, "sequences_per_update": 4, key: value}
        write_model_card(tmp_path, config_of(tmp_path, train=train), run=tmp_path, step=2)
        card = (tmp_path / "README.md").read_text()
        assert front_matter(card) == {
            "library_name": "transformers",
            "base_model": "org/base",
            "pipeline_tag": "text-generation",
            "tags": ["ray-rlhf", "dpo"],
            "datasets": ["org/pairs"],
        }
        expected = {
            **{"base model": "org/base@v2", "method": "dpo", "training data": "org/pairs", "steps": "2"},
            "learning rate": f"0.001 (constant, warm-up: {shown})",
            **{"sequences per update": "4", "eval/held_out/accuracy": "0.5", "update/loss/mean": "0.25"},
        }
        assert {f"| {name} | {text} |" for name, text in expected.items()} <= set(card.splitlines())


def test_paths_of_the_machine_are_not_told(tmp_path: Path) -> None:
    model = {"model": "/home/me/secret/model"}
    card = model_card(config_of(tmp_path, policy=model, data={"train": "/home/me/pairs.jsonl"}), [])
    assert "/home" not in card
    assert "| base model | model |" in card
    assert "| training data | pairs.jsonl |" in card
    assert front_matter(card).keys() == {"library_name", "pipeline_tag", "tags"}


def test_an_adapter_and_a_reward_model_say_so(tmp_path: Path) -> None:
    lora = config_of(tmp_path, policy={"model": "org/base", "lora": {"rank": 8}})
    assert front_matter(model_card(lora, []))["library_name"] == "peft"
    assert "| LoRA | rank 8, alpha 32 |" in model_card(lora, [])
    assert "needs its base model" in model_card(lora, [])
    assert front_matter(model_card(lora, [], merged=True))["library_name"] == "transformers"
    reward = config_of(tmp_path, algorithm={"name": "reward_model"})
    assert front_matter(model_card(reward, []))["pipeline_tag"] == "text-classification"

"""Runs on images through the real actors: each mode of rollouts, a kill with the same bits after, and blind models."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import main
from rlhf.tracking.run_folder.atomic import read_lines
from rlhf.vision.keys import image_key, image_name
from tests.integration.faults import actor_processes, kill_all, once, steps_done, wait_for
from tests.integration.games import samples
from tests.integration.recipes import one_thread, rows, start, train_here, without_clocks, write_config
from tests.seen_logprobs import BLUE, RED, png

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]
CHANGES: dict[str, Any] = {
    "policy": {"model": "tiny:qwen3_vl"},
    "algorithm": {"name": "grpo", "kl": {"coef": 0.05}, "correction": {"preset": "token_tis"}},
    "eval": {"exchange_images": True},
    "rewards": {"digits": {"function": "format_regex", "args": {"pattern": "(?s).*[0-9a-z].*"}}},
    "train": {"steps": 3},
    "cluster": {"roles": one_thread("policy", "reference", "rollout")},
}
# Samples of older weights differ from the trainer by the steps between, so these steps are small.
SMALL = {"train": {"steps": 3, "lr": 1e-7}}
MODES: dict[str, dict[str, Any]] = {
    "turns": {},
    "linear_attention": {"policy": {"model": "tiny:qwen3_5"}},
    "pipelined": {"rollouts": {"max_staleness": 2}, **SMALL},
    "recompute": {"rollouts": {"max_staleness": 2, "weight_updates": "in_flight"}, **SMALL},
    "keep": {"rollouts": {"max_staleness": 2, "weight_updates": "in_flight", "kv_after_update": "keep"}, **SMALL},
    "streamed": {"train": {"streamed": True}},
    "carry_over": {"rollouts": {"oversample": 1.5, "carry_over": True}, **SMALL},
}


def config_of(folder: Path, changes: dict[str, Any]) -> tuple[Path, Path]:
    """Write a configuration with a prompt per image, some prompts without an image and some with two."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for row in range(24):
        images = [f"images/{row}_{i}.png" for i in range((1, 1, 2, 0)[row % 4])]
        for i, name in enumerate(images):
            (folder / name).write_bytes(png(10 * row + i, 48 if i else 64, 32))
        content = [{"type": "image", "image": name} for name in images] + [{"type": "text", "text": "Colour?"}]
        lines.append(json.dumps({"messages": [{"role": "user", "content": content}]}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "eval.jsonl").write_text("\n".join(lines[:4]))
    data = {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl")}
    data |= {"apply_chat_template": True, "max_prompt_tokens": 100}
    base = {**CHANGES, "data": data, "run": {"name": "run", "dir": str(folder), "seed": 3}}
    merged = {key: {**base.get(key, {}), **changes.get(key, {})} for key in {**base, **changes}}
    return write_config(folder / "run.yaml", merged), folder / "run"


@pytest.mark.parametrize("mode", MODES)
def test_engine_and_trainer_see_the_same_images(mode: str, ray_local: None, tmp_path: Path) -> None:
    config, run = config_of(tmp_path, MODES[mode])
    train_here(config)
    found = rows(run)
    assert len(found) >= 3
    is_stale = any(row["experience/policy_lag/max"] > 0 for row in found[1:])
    assert is_stale == ("lr" in MODES[mode].get("train", {}))
    for row in found[1:]:
        # Behind a padding token, whose embedding is zero, the norm turns the smallest step into a large one.
        assert row[f"experience/rollout_logprob_diff/{'mean' if is_stale else 'max'}"] < 1e-3
        assert row["weight_sync/probe_max_diff"] < 1e-4
    effects = [row for row in found if "weight_sync/image_effect_policy" in row]
    assert len(effects) == 1  # at the first sync
    assert effects[0]["weight_sync/image_effect_policy"] == pytest.approx(
        effects[0]["weight_sync/image_effect_engine"], rel=0.05
    )
    assert any("eval/heldout.exchanged/score" in row for row in found)


def test_an_engine_in_place_of_a_killed_one_sees_with_the_frozen_tower(ray_local: None, tmp_path: Path) -> None:
    """No sync brings the tower, so the successor has the tower of the model's folder."""
    config, run = config_of(tmp_path, {"train": {"steps": 4}})

    def kill() -> None:
        (engine,) = actor_processes("RolloutEngine")
        os.kill(engine.pid, signal.SIGKILL)

    with once(lambda: steps_done(run) >= 2, kill):
        train_here(config)
    found = rows(run)
    assert sum(row.get("recovery/rollout/total", 0.0) for row in found) == 1.0
    for row in found[1:]:
        assert row["experience/rollout_logprob_diff/max"] < 1e-3
        assert row["weight_sync/probe_max_diff"] < 1e-4


def test_a_run_on_fixed_data_tells_how_much_its_images_matter(ray_local: None, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(png(1))
    row = {"prompt": "Which colour?", "images": ["red.png"], "completion": "red"}
    (tmp_path / "train.jsonl").write_text("\n".join([json.dumps(row)] * 8))
    config = {
        "run": {"name": "run", "dir": str(tmp_path), "seed": 0},
        "policy": {"model": "tiny:qwen3_vl", "dtype": "float32"},
        "algorithm": {"name": "sft"},
        "data": {"train": str(tmp_path / "train.jsonl")},
        "train": {"steps": 2, "sequences_per_update": 4, "lr": 1e-3},
        "cluster": {"object_store_gib": 0.25, "start_timeout_s": 200.0},
    }
    train_here(write_config(tmp_path / "run.yaml", config, base={}))
    assert [row["update/image_effect"] > 1e-6 for row in rows(tmp_path / "run") if "update/image_effect" in row] == [
        True
    ]


def test_a_killed_run_on_images_repeats_its_steps(ray_local: None, tmp_path: Path) -> None:
    config, run = config_of(
        tmp_path, {"rollouts": {"max_staleness": 2}, "train": {"steps": 100, "checkpoint_every": 3}}
    )
    process = start(config)
    wait_for(run / "metrics.jsonl", 6, timeout_s=600)
    kill_all(process.pid)
    process.wait(timeout=30)
    before = without_clocks(read_lines(run / "metrics.jsonl"))
    for own in run.glob(".own-*"):
        shutil.rmtree(own)
    train_here(config, "--resume", "step_000003", f"train.steps={len(before)}")  # the last step evaluates in any case
    again = without_clocks(rows(run))[: len(before)]
    ours, theirs = ([{k: v for k, v in row.items() if "image_effect" not in k} for row in r] for r in (again, before))
    assert ours == theirs


AGENT = """
import base64

async def solve(task, client):
    messages = [{{"role": "user", "content": task["prompt"]}}]
    for name in ("red", "blue"):
        answer = await client.openai.chat.completions.create(model="m", messages=messages)
        messages.append({{"role": "assistant", "content": answer.choices[0].message.content}})
        with open(f"{folder}/{{name}}.png", "rb") as file:
            url = "data:image/png;base64," + base64.b64encode(file.read()).decode()
        shown = [{{"type": "image_url", "image_url": {{"url": url}}}}, {{"type": "text", "text": "Colour?"}}]
        messages.append({{"role": "tool", "tool_call_id": name, "content": shown}})
    answer = await client.openai.chat.completions.create(model="m", messages=messages)
    return answer.choices[0].message.content
"""


def test_an_agent_is_trained_whose_tool_returns_images(ray_local: None, tmp_path: Path) -> None:
    for name, image in (("red", RED), ("blue", BLUE)):
        (tmp_path / f"{name}.png").write_bytes(image)
    (tmp_path / "agent.py").write_text(AGENT.format(folder=tmp_path))
    (tmp_path / "long.py").write_text("def long(prompt, response, result):\n    return float(len(result))\n")
    (tmp_path / "train.jsonl").write_text("".join(f'{{"prompt": "Look, {i}."}}\n' for i in range(24)))
    config = {
        "run": {"name": "run", "dir": str(tmp_path), "seed": 3},
        "policy": {"model": "tiny:qwen3_vl"},
        "algorithm": {"name": "grpo"},
        "data": {"train": str(tmp_path / "train.jsonl"), "eval": None, "apply_chat_template": None},
        "rollouts": {
            "max_new_tokens": 6,
            "agent": {"function": f"{tmp_path}/agent.py:solve", "max_tokens": 200, "timeout_s": 60.0},
        },
        "rewards": {"long": {"function": f"{tmp_path}/long.py:long"}},
        "train": {"steps": 2},
        "eval": None,
    }
    train_here(write_config(tmp_path / "run.yaml", config))
    for row in rows(tmp_path / "run")[-2:]:
        # Trainer and sampler agree about every sampled token, so both saw the same images at the same places.
        assert row["experience/rollout_logprob_diff/max"] < 1e-3
        assert row["agents/calls/mean"] == 3.0
        assert row["agents/broken_prefixes/fraction"] == row["agents/errors/total"] == 0.0
    names = [image_name(image_key(image)) for image in (RED, BLUE)]
    assert all(sample["images"] == names for sample in samples(tmp_path / "run", 2))
    stored = {path.name for path in (tmp_path / "run" / "images").iterdir() if path.is_file()}
    assert set(names) <= stored  # named by samples


def test_a_blind_model_ends_the_run(ray_local: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The processor of the model makes nearly equal pixels of all images, in the trainer and in the engine."""
    config, run = config_of(tmp_path, {})
    train_here(config, "train.steps=1")
    model = next((run / "models").iterdir())
    settings = model / "processor_config.json"
    processor = json.loads(settings.read_text())
    processor["image_processor"]["image_std"] = [1e9] * 3
    settings.write_text(json.dumps(processor))
    assert main(["train", str(config), "--quiet", f"policy.model={model}", "run.name=blind"]) == 1
    assert "the model cannot see its images" in capsys.readouterr().err

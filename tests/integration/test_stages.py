"""Merges and evaluations are stages: two trained models become one model, compared with one of the two.

The pipeline is killed in the evaluation and in the merge, and resumed: only unfinished work is repeated.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import rlhf
from rlhf.config.files.base_file import read_tree
from rlhf.data.sources import read_rows
from rlhf.data.tasks import TaskSource
from rlhf.models.files.tiny import build_tiny_llama
from tests.integration.faults import kill_all, wait_for
from tests.integration.recipes import rows, start, train, write_config

TRAIN = {"steps": 2, "sequences_per_update": 16, "max_tokens_per_microbatch": 512, "lr": 1e-3}
MODELS = {"first": {"model": "stage:first", "weight": 3.0}, "second": {"model": "stage:second"}}
JUDGED: dict[str, Any] = {
    **{"data": {"task": "running_totals", "split": "eval", "size": 8}, "apply_chat_template": False},
    **{"rewards": {"seen": {"function": "seen.py:seen"}}, "reward_policy": {"on_error": "drop", "timeout_s": 100.0}},
    **{"temperature": 1.0, "samples_per_prompt": 2, "max_new_tokens": 8, "k": [2]},
}
PIPELINE: dict[str, Any] = {
    "policy": {"model": "tiny:llama", "dtype": "float32"},
    "data": {"train": {"task": "running_totals", "split": "sft", "size": 64}, "apply_chat_template": False},
    "cluster": {"object_store_gib": 0.25, "start_timeout_s": 200.0, "call_timeout_s": 120.0},
    "train": TRAIN,
    "stages": {
        "first": {"algorithm": {"name": "sft"}},
        "second": {"algorithm": {"name": "sft"}, "data": {"train": {"seed": 1}}},
        "soup": {"merge": {"method": "linear", "models": MODELS, "dtype": "float32"}},
        "judge": {"evaluate": {"model": "stage:soup", "against": "stage:first", **JUDGED}},
    },
}
HANGS = "import time\n\n\ndef seen(prompt, response, answer):\n    time.sleep(90)\n    return 1.0\n"
SEEN = """
def seen(prompt, response, answer):
    if prompt == {prompt!r}:
        raise ValueError("not this one")
    return float(len(response))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_evaluation_killed_half_way_is_done_again(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", {"run": {"name": "demo", "dir": str(tmp_path), "seed": 3}}, PIPELINE)
    reward, folder = tmp_path / "seen.py", tmp_path / "demo"
    reward.write_text(HANGS)
    process = start(config)
    wait_for(folder / "judge" / "environment.json", 1, timeout_s=250)
    kill_all(process.pid)
    assert not (folder / "judge" / "eval.json").exists()
    first, second, soup = (load_file(folder / s / "final" / "model.safetensors") for s in ("first", "second", "soup"))
    for name, weight in soup.items():
        torch.testing.assert_close(weight, (3 * first[name] + second[name]) / 4)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/final/*")}

    some = read_rows(TaskSource(task="running_totals", split="eval", size=8), columns={})[5].columns["prompt"]
    reward.write_text(SEEN.format(prompt=some))
    train(config, "--resume", "auto")
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*/final/*")}
    check_judgement(folder / "judge", failed=some)
    rlhf.train(config, resume=True)  # nothing is left
    assert list(read_tree(folder / "config.resolved.yaml").values["stages"]) == ["first", "second", "soup", "judge"]
    with pytest.raises(rlhf.UserError, match=r"judge already holds a finished run: its result is in eval\.json"):
        rlhf.train(rlhf.load_config(folder / "judge" / "config.resolved.yaml"))


def check_judgement(judge: Path, *, failed: str) -> None:
    found = json.loads((judge / "eval.json").read_text())
    assert found["model"].endswith("demo/soup/final")
    assert found["against"].endswith("demo/first/final")
    held_out = found["sets"]["heldout"]
    assert (held_out["num_rows"], held_out["num_failed"]) == (7, 1)
    (row,) = rows(judge)
    assert row["step"] == 0
    for name in ("score", "pass@2", "win_rate", "truncated"):
        assert row[f"eval/heldout/{name}"] == held_out["metrics"][name]["value"]
    assert row["eval/heldout/seen"] == held_out["metrics"]["rewards/seen"]["value"]
    assert row["time/eval_s"] > 0
    samples = [json.loads(line) for line in (judge / "samples" / "step_000000.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * 7 * 2
    errors = [json.loads(line) for line in (judge / "errors.jsonl").read_text().splitlines()]
    assert {(error["stage"], error["kind"], error["source"]) for error in errors} == {("rewards", "raised", "seen")}
    assert failed not in {sample["prompt"] for sample in samples}


KILLED = """
import os, signal, sys
import actors.run.train
from rlhf.cli import main

def half(config, sources, folder, *, out, quiet):
    (folder / "model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

actors.run.train.write_merge = half
main(["train", sys.argv[1]])
"""


def test_a_merge_killed_half_way_is_done_again(tmp_path: Path) -> None:
    """No stage trains or answers, so no Ray is started."""
    for seed, name in enumerate(("a", "b")):
        build_tiny_llama(tmp_path / name, seed=seed)
    models = {name: {"model": str(tmp_path / name)} for name in ("a", "b")}
    stages = {
        "soup": {"merge": {"method": "linear", "models": models}},
        "more": {"merge": {"method": "slerp", "base": "stage:soup", "models": {"a": models["a"]}}},
    }
    config = write_config(tmp_path / "run.yaml", {"run": {"name": "demo", "dir": str(tmp_path)}, "stages": stages}, {})
    done = subprocess.run([sys.executable, "-c", KILLED, str(config)], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "demo" / "soup" / "final").exists()
    rlhf.train(config, resume=True, quiet=True)
    for name in ("soup", "more"):
        folder = tmp_path / "demo" / name
        assert len(load_file(folder / "final" / "model.safetensors")) > 10
        assert not list(folder.glob(".*partial*"))
    record = read_tree(tmp_path / "demo" / "more" / "final" / "merge.yaml").values["merge"]
    assert record["base"] == str(tmp_path / "demo" / "soup" / "final")
    assert record["out"] == str(tmp_path / "demo" / "more" / "final")
    merged = tmp_path / "demo" / "more" / "final"
    again = rlhf.merge(merged / "merge.yaml", [f"merge.out={tmp_path / 'again'}"], quiet=True)
    assert (again / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()

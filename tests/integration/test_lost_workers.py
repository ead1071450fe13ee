"""Workers are killed during a run: the run goes on with the same results.

Real runs of the tiny model in this process, on the session's Ray.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from actors.run.engine_pool import ENGINE_POOL
from rlhf.cli import main
from rlhf.models.files.tiny import build_tiny_llama
from tests.integration.faults import FINE, GRPO, SFT, actor_processes, once, steps_done, write_run
from tests.integration.recipes import rows, without_clocks

THREE: Mapping[str, Any] = {"train": {"steps": 3, "checkpoint_every": 3}}
KL: Mapping[str, Any] = {"algorithm": {"name": "grpo", "kl": {"coef": 0.05}}}
OFFLINE_TEACHER: Mapping[str, Any] = {"algorithm": {"name": "distillation"}, "cluster": {"roles": None}}
ONLINE_TEACHER: Mapping[str, Any] = {"algorithm": {"name": "on_policy_distillation"}, "rewards": None}
ENDS_ITS_WORKER = """
import os, pathlib, signal

def reward(prompt, response):
    try:
        pathlib.Path(__file__).with_name("killed").touch(exist_ok=False)
        os.kill(os.getppid(), signal.SIGKILL)
    except FileExistsError:
        pass
    return float(len(response) % 3)
"""


@pytest.fixture(autouse=True)
def engines_stay(ray_local: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep the engines for the second run of a test, for an earlier start."""
    monkeypatch.setattr(ENGINE_POOL, "keeps", True)
    yield
    ENGINE_POOL.close()
    assert not actor_processes()


def assert_unbroken(folder: Path, config: Path, losses: Mapping[str, int], worker: str) -> None:
    """Run a configuration twice, and kill a worker of this class in the first run after a step. The runs are equal.

    `losses`: of each role, in all.
    """
    broken, unbroken = folder / "broken", folder / "unbroken"
    with once(lambda: steps_done(broken) >= 1, lambda: actor_processes(worker)[0].kill()):
        assert main(["train", str(config), "--quiet"]) == 0
    assert main(["train", str(config), "--quiet", "run.name=unbroken"]) == 0

    assert without_clocks(rows(broken)) == without_clocks(rows(unbroken))
    assert {role: sum(row.get(f"recovery/{role}/total", 0.0) for row in rows(broken)) for role in losses} == losses
    ours, theirs = (load_file(run / "final" / "model.safetensors") for run in (broken, unbroken))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    records = [json.loads(line) for line in (broken / "errors.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(record["kind"], record["source"]) for record in records] == [("died", f"{role} 0") for role in losses]


@pytest.mark.slow
def test_a_run_that_loses_its_reward_and_reference_workers_equals_an_unbroken_one(tmp_path: Path) -> None:
    """The reward worker dies during the scoring of the first group."""
    config = write_run(tmp_path, "broken", GRPO, KL, THREE, reward=ENDS_ITS_WORKER)
    assert_unbroken(tmp_path, config, {"reward": 1, "reference": 1}, "ReferenceWorker")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("base", "changes", "worker"),
    [
        (GRPO, ONLINE_TEACHER, "OnlineTeacherWorker"),
        (SFT, OFFLINE_TEACHER, "TeacherWorker"),
    ],
    ids=["a teacher of responses", "a teacher of fixed data"],
)
def test_a_run_that_loses_its_teacher_equals_an_unbroken_one(
    tmp_path: Path, base: Mapping[str, Any], changes: Mapping[str, Any], worker: str
) -> None:
    teacher = {"model": str(build_tiny_llama(tmp_path / "teacher", seed=1))}
    config = write_run(tmp_path, "broken", base, changes, THREE, {"teacher": teacher}, reward=FINE)
    assert_unbroken(tmp_path, config, {"teacher": 1}, worker)

"""Failures during a run give exit code 1, and stage, actor, rank and cause in one paragraph. Nothing is left behind.

Real runs of the tiny model in this process, on the session's Ray; a second thread kills and stops processes. The last
tests start the command line with a local Ray. Not covered: the death of a whole node.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf.cli import main
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.tracking.run_folder.folder import RunFolder
from tests.integration.faults import (
    GRPO,
    SFT,
    actor_processes,
    await_steps,
    checkpoints,
    end,
    once,
    steps_done,
    write_run,
)
from tests.integration.recipes import rows, start, without_clocks
from tests.support_measurements import model_folder


def failed(capsys: pytest.CaptureFixture[str], config: Path, *arguments: str, code: int = 1) -> str:
    """Return the final paragraph of `rlhf train`."""
    found = main(["train", str(config), "--quiet", *arguments])
    said = capsys.readouterr().err
    assert found == code, said
    assert "Traceback" not in said
    (_, paragraph) = said.split("rlhf: error: ")
    assert not actor_processes()
    return paragraph.strip()


def last_error(run: Path) -> dict[str, Any]:
    """The last record of errors.jsonl."""
    found: dict[str, Any] = json.loads((run / "errors.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return found


SOMETIMES = """
import os, pathlib, signal
HERE = pathlib.Path(__file__).parent

def reward(prompt, response):
    if first("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    for name in ("raises", "hangs", "nan"):
        if prompt == claimed(name, prompt):
            if name == "raises":
                raise ValueError("a wrong prompt")
            while name == "hangs":
                pass
            return float("nan")
    with (HERE / "good").open("a") as good:
        while good.tell() == 16:
            pass
        good.write(".")
    return float(len(response))

def first(name):
    try:
        (HERE / name).touch(exist_ok=False)
        return True
    except FileExistsError:
        return False

def claimed(name, prompt):
    if all((HERE / other).read_text() != prompt for other in ("raises", "hangs", "nan") if (HERE / other).exists()):
        if first(name):
            (HERE / name).write_text(prompt)
    return (HERE / name).read_text()
"""


def test_dropped_groups_are_replaced_counted_and_bounded(
    ray_local: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Three prompts fail in three ways. The process of a fourth prompt is killed from outside and replaced. After the
    first step's 16 responses, all calls hang."""
    drop = {"reward_policy": {"on_error": "drop", "timeout_s": 1.0, "max_dropped_fraction": 0.2}}
    said = failed(capsys, write_run(tmp_path, "drops", GRPO, drop, reward=SOMETIMES))
    run = tmp_path / "drops"
    assert [row["rollouts/dropped_groups/total"] for row in rows(run)] == [3]
    records = [json.loads(line) for line in (run / "errors.jsonl").read_text().splitlines()]
    first = [record for record in records if record["step"] == 1]
    assert {record["kind"] for record in first} == {"raised", "timeout", "not_a_number"}
    assert {(record["stage"], record["source"]) for record in first} == {("rewards", "mine")}
    assert len({record["prompt_id"] for record in first}) == 3
    assert (records[-1]["stage"], records[-1]["step"]) == ("run", 2)
    assert (tmp_path / "killed").exists()
    samples = [json.loads(line) for line in (run / "samples" / "step_000001.jsonl").read_text().splitlines()]
    assert len(samples) == 16  # 4 prompts x 4 samples: the batch is whole
    assert not {row["prompt_id"] for row in samples} & {record["prompt_id"] for record in first}

    words = ["rewards, step 2: reward `mine`", "did not answer in time", "no answer within 1 s, at ", "to prompt "]
    assert all(word in said for word in [*words, "mine.py:", "7 of the last 11 groups were dropped"]), said
    (scores,) = run.glob(".own-*/spool/scores.jsonl")
    assert "timeout" not in scores.read_text(), "a resumed run asks the mended reward"


@pytest.mark.slow
def test_killed_and_stopped_ranks_are_replaced_and_the_run_ends_as_if_nothing_had_happened(
    ray_local: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The run has fixed data. test_lost_workers.py kills ranks of a run with rollouts."""
    few = {"train": {"steps": 60, "checkpoint_every": 20}}
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert main(["train", str(write_run(tmp_path, unbroken.name, SFT, few)), "--quiet"]) == 0
    config = write_run(tmp_path, broken.name, SFT, few)
    assert main(["train", str(config), "--quiet", "--until", "2"]) == 0
    other = build_tiny_llama(tmp_path / "other", seed=0, tied=True)
    said = failed(capsys, config, "--resume", "auto", f"policy.model={other}", code=2)
    assert re.search(r"step_\d+ is a checkpoint of another model than policy.model", said), said

    def kill() -> None:
        actor_processes("SupervisedWorker")[1].kill()

    def stop() -> None:
        actor_processes("SupervisedWorker")[0].suspend()

    resume = ["--resume", "auto", "cluster.call_timeout_s=6"]
    with once(lambda: steps_done(broken) >= 5, kill), once(lambda: steps_done(broken) >= 30, stop):
        assert main(["train", str(config), "--quiet", *resume]) == 0
    records = [json.loads(line) for line in (broken / "errors.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["kind"] for record in records] == ["died", "hung"]
    assert re.search(r"Its last output is in /\S+/worker-\*-\d+\.err", records[0]["message"])
    assert without_clocks(rows(broken)) == without_clocks(rows(unbroken))
    assert sum(row["recovery/policy/total"] for row in rows(broken)) == 2
    weights = [(run / "final" / "model.safetensors").read_bytes() for run in (broken, unbroken)]
    assert weights[0] == weights[1]
    assert not actor_processes()


def test_a_loss_that_is_not_finite_leaves_no_checkpoint(
    ray_local: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one = {"train": {"lr": 1e30, "checkpoint_every": 1, "warmup_steps": 0}, "cluster": {"roles": None}}
    said = failed(capsys, write_run(tmp_path, "diverges", SFT, one))
    assert re.match(r"update: policy rank 0 failed: The (loss|gradient).* not finite in optimizer step 2", said), said
    assert checkpoints(tmp_path / "diverges") == ["step_000001"]
    assert [row["step"] for row in rows(tmp_path / "diverges")] == [1]


def test_a_model_that_only_a_rank_finds_broken_is_named(
    ray_local: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The rank with non-finite weights refuses the weights at the start."""
    model = build_tiny_llama(tmp_path / "broken", seed=0)
    weights = load_file(model / "model.safetensors")
    save_file({name: torch.full_like(w, torch.nan) for name, w in weights.items()}, model / "model.safetensors")
    changes = {"policy": {"model": str(model)}, "cluster": {"roles": None}}
    said = failed(capsys, write_run(tmp_path, "broken_run", SFT, changes), code=2)
    assert said.startswith(f"The hidden states of the model {model} are not finite"), said


@pytest.mark.slow
def test_an_engine_that_computes_another_model_stops_the_run(
    ray_local: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """vLLM's rotary embedding for a CPU is wrong for LFM2, so engines leave it out. This option adds it again."""
    model = model_folder(
        tmp_path / "lfm2", "lfm2", std=0.2, hidden_size=64, num_attention_heads=2, num_key_value_heads=2
    )
    option = {"engine_args": {"compilation_config": {"custom_ops": ["all"]}}}
    config = write_run(tmp_path, "wrong", GRPO, {"policy": {"model": model}, "cluster": {"roles": {"rollout": option}}})
    message = "weight sync to version 0: rollout engine 0 computes different log-probabilities than the policy"
    assert message in failed(capsys, config)
    assert not steps_done(tmp_path / "wrong")


ONE_PROCESS_MODEL = """
import torch
from transformers import LlamaForCausalLM


class OwnForCausalLM(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        if torch.distributed.is_initialized():
            raise RuntimeError("this model cannot be sharded")
"""


def test_a_rank_that_fails_at_its_start_is_named(
    ray_local: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The model's own code loads in the driver's checks, without a process group, and fails in the rank."""
    model = build_tiny_llama(tmp_path / "sharded", seed=0)
    (model / "modeling_own.py").write_text(ONE_PROCESS_MODEL, encoding="utf-8")
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}
    (model / "config.json").write_text(json.dumps(config))
    changes = {"policy": {"model": str(model), "trust_remote_code": True}, "cluster": {"roles": None}}
    said = failed(capsys, write_run(tmp_path, "fails_at_start", SFT, changes))
    assert said == "start: policy rank 0 failed: RuntimeError: this model cannot be sharded"
    assert last_error(tmp_path / "fails_at_start")["kind"] == "RunError"


def test_more_than_the_cluster_has(ray_local: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    wants = {"cluster": {"roles": {"policy": {"workers": 64, "cpus": 1.0}}}, "train": {"sequences_per_update": 64}}
    said = failed(capsys, write_run(tmp_path, "large", SFT, wants), code=2)
    assert "the run needs more than the cluster has" in said
    assert re.search(r"policy +64 +1\.00", said), said
    assert "needed CPU: 64, available: 4" in said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_runs_at_once_have_a_ray_each_and_leave_nothing_when_they_are_killed_or_asked_to_end(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked, killed = tmp_path / "asked", tmp_path / "killed"
    one_rank = {"cluster": {"roles": None}}
    at_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as shells have it for commands in the background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, at_ctrl_c))
    runs = {
        run: start(write_run(tmp_path, run.name, SFT, one_rank), without=["RAY_AUTH_MODE"]) for run in (asked, killed)
    }
    request.addfinalizer(lambda: [process.kill() for process in runs.values()])  # left by a failure
    await_steps(runs, {asked: 3, killed: 3})
    rays = [dict(rays_below(process.pid)) for process in runs.values()]
    assert [len(one) for one in rays] == [1, 1]
    assert len({token for one in rays for token in one.values()}) == 2  # a process with another token cannot join
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # the session's Ray
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    auto = write_run(tmp_path, "auto", SFT, {"cluster": {"roles": None, "object_store_gib": None, "address": "auto"}})
    assert main(["train", str(auto), "--quiet"]) == 2
    assert "no cluster was started on this machine with `ray start`" in capsys.readouterr().err

    # Two agents of Ray, which hold nothing, notice the sudden death of their parent only after a minute or two.
    end(runs.pop(killed), signal.SIGKILL, -signal.SIGKILL, late={"ray::DashboardAgent", "ray::RuntimeEnvAgent"})
    await_steps(runs, {asked: steps_done(asked) + 3})
    end(runs.pop(asked), signal.SIGTERM, 75)
    for run in (asked, killed):
        with RunFolder.open(tmp_path, run.name, resume=True) as folder:  # the lock is free, and the run can continue
            assert folder.latest_checkpoint() is not None
    log = asked.with_suffix(".log").read_text(encoding="utf-8")
    kept = r"rlhf: preempted: a checkpoint of step \d+ is written; the run continues after step \d+\. "
    assert re.search(kept + r"Continue with: rlhf train .*--resume", log)
    assert "Traceback" not in log
    assert "SIGTERM received" not in log  # Ray's own handler would write the stack of C
    assert "authentication" not in log


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_sigterm_to_all_processes_of_a_run_at_once_ends_it_in_order(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run = tmp_path / "all"
    process = start(write_run(tmp_path, run.name, SFT, {"cluster": {"roles": None}}), without=["RAY_AUTH_MODE"])
    request.addfinalizer(process.kill)
    await_steps({run: process}, {run: 3})
    end(process, signal.SIGTERM, 75, send=os.killpg)  # its own Ray's daemons are in its process group
    log = run.with_suffix(".log").read_text(encoding="utf-8")
    assert re.search(r"rlhf: preempted: .*\. Continue with: rlhf train", log)
    assert "Traceback" not in log
    assert "GCS" not in log


def rays_below(pid: int) -> Iterator[tuple[str, str]]:
    """Yield address and token of a driver's Ray from the environment of Ray's processes."""
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            address = [word.partition("=")[2] for word in process.cmdline() if word.startswith("--gcs-address=")]
            if any(address):
                yield address[0], process.environ()["RAY_AUTH_TOKEN"]

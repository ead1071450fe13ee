"""Loops of the user run with Ray, real ranks and real engines: the examples, a lost rank, an exception, Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest

from actors.jobs.submit import Jobs
from rlhf.commands.run import Run
from rlhf.tracking.sinks.tracker import read_metrics
from tests.integration.recipes import ONLINE, PPO, merge, train, weights, without_clocks, write_config
from tests.integration.test_notebooks_run import execute
from tests.integration.test_submit import head as head

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]
SMALL = ["rollouts.prompts_per_step=4", "train.sequences_per_update=16"]
SCRIPT = """
import asyncio, json, os, signal, sys, time
import rlhf

async def main():
    async with rlhf.start("examples/loops/letters.yaml", sys.argv[2:]) as loop:
        async with loop.next_step():
            groups = await loop.sample()
            try:
                async with rlhf.start("examples/loops/letters.yaml", ["run.name=second"]):
                    pass
            except rlhf.UserError as error:
                print("second:", error)
            await loop.experience(groups)
            await loop.forward_backward()
            await loop.optim_step()
            await loop.sync()
        print("a step is done", flush=True)
        async with loop.next_step():
            await loop.experience(await loop.sample())
            if sys.argv[1] == "raise":
                raise ValueError("the loop is wrong")
            if sys.argv[1] == "wait":
                await asyncio.sleep(300)
            processes = json.loads((loop.folder / "processes.json").read_text())
            os.kill(next(one["pid"] for one in processes if one["who"] == "policy rank 0"), signal.SIGKILL)
            await loop.forward_backward()

asyncio.run(main())
"""


def command(*words: str) -> list[str]:
    return [sys.executable, *words]


def settings(folder: Path, name: str) -> list[str]:
    return [f"run.dir={folder}", f"run.name={name}", "train.steps=3", *SMALL]


def rows(folder: Path) -> list[dict[str, Any]]:
    return without_clocks(list(read_metrics(folder)))


def finished(folder: Path, name: str, *words: str) -> Run:
    done = subprocess.run(command(*words), cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return Run(folder / name)


def test_the_examples_loop_gives_the_numbers_of_the_command(tmp_path: Path) -> None:
    own = finished(tmp_path, "own", "examples/loops/grpo.py", *settings(tmp_path, "own"))
    train = ("-m", "rlhf.cli", "train", "examples/loops/letters.yaml", *settings(tmp_path, "trained"))
    trained = finished(tmp_path, "trained", *train)
    assert own.state == trained.state == "finished"
    assert len(rows(own.folder)) == 3
    assert rows(own.folder) == rows(trained.folder)
    names = ["final/model.safetensors", "samples/step_000003.jsonl"]
    assert all((own.folder / name).read_bytes() == (trained.folder / name).read_bytes() for name in names)
    own.report(tmp_path / "page.html")
    assert "rewards/share" in (tmp_path / "page.html").read_text(encoding="utf-8")


STEPS = """
import asyncio, sys
import rlhf.tracking.sinks.backends

class Steps(rlhf.tracking.sinks.backends.TrackerBackend):
    name = "steps"
    seen = []

    def log(self, step):
        self.seen.append(step.step)

async def main(config, resume, until):
    async with rlhf.start(config, resume=resume, trackers=[Steps()]) as loop:
        if not loop.step:
            await loop.evaluate()
        while loop.step < until:
            async with loop.next_step() as step:
                batch = await loop.experience(await loop.sample())
                for minibatch in loop.visits(batch):
                    await loop.forward_backward(minibatch)
                    await loop.optim_step()
                await loop.sync()
                if step % loop.config.eval.every == 0:
                    await loop.evaluate()
            if step == 2:
                await loop.save()
        if loop.step == loop.num_steps:
            await loop.export()
    print("seen", Steps.seen)

asyncio.run(main(sys.argv[1], sys.argv[2] == "resume", int(sys.argv[3])))
"""
DIGITS = {"digits": {"function": "format_regex", "args": {"pattern": "(?s).*[0-9].*"}}}
GRPO = merge(ONLINE, {"algorithm": {"name": "grpo", "kl": {"coef": 0.01}}, "rewards": DIGITS})
GAME: dict[str, Any] = {
    "data": {"train": {"task": "guessing_game"}, "eval": {"task": "guessing_game"}},
    "rollouts": {"environment": {"name": "guess_number", "args": {"high": 7}, "max_turns": 3, "max_tokens": 64}},
    "rewards": {"won": {"environment": True}},
}


@pytest.mark.parametrize(
    "changes",
    [{"policy": {"lora": {"rank": 4}}}, {**PPO, "policy": {"lora": {"rank": 4}}}, GAME],
    ids=["adapter", "critic", "environment"],
)
def test_a_resumed_loop_gives_the_numbers_of_the_command(tmp_path: Path, changes: dict[str, Any]) -> None:
    """The loop ends after the third step, and continues from the checkpoint of the second."""
    own, trained = (
        write_config(tmp_path / f"{name}.yaml", merge(changes, {"run": {"name": name, "dir": str(tmp_path)}}), GRPO)
        for name in ("own", "trained")
    )
    seen = [
        subprocess.run(
            command("-c", STEPS, str(own), *words), cwd=ROOT, capture_output=True, text=True, timeout=400, check=True
        ).stdout.splitlines()[-1]
        for words in (("start", "3"), ("resume", "4"))
    ]
    assert seen == ["seen [0, 1, 2, 3]", "seen [3, 4]"]
    train(trained)
    assert len(rows(tmp_path / "own")) == 5
    assert rows(tmp_path / "own") == rows(tmp_path / "trained")
    assert weights(tmp_path / "own") == weights(tmp_path / "trained")


def test_the_curriculum_runs(tmp_path: Path) -> None:
    run = finished(tmp_path, "curriculum", "examples/loops/curriculum.py", f"run.dir={tmp_path}", "train.steps=3")
    assert run.state == "finished"
    counts = run.metrics[["own/prompts_digits", "own/prompts_vowels", "own/prompts_x"]]
    assert list(counts.sum(axis="columns")) == [12.0] * 3
    assert list(counts.loc[1]) == [4.0] * 3


def started(folder: Path, mode: str) -> subprocess.Popen[str]:
    """Start the script, and wait for its first step."""
    words = command("-c", SCRIPT, mode, *settings(folder, mode))
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline(), process.stdout.readline()]
    assert lines[0].startswith(f"second: rlhf.start: the block of run {mode} is still open"), lines
    assert lines[1] == "a step is done\n"
    return process


def errors(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "errors.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("mode", "kind", "text"),
    [("raise", "ValueError", "the loop is wrong"), ("lose", "WorkerLost", "update: policy rank 0")],
)
def test_an_exception_or_a_lost_rank_ends_the_roles(tmp_path: Path, mode: str, kind: str, text: str) -> None:
    process = started(tmp_path, mode)
    children = psutil.Process(process.pid).children(recursive=True)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert text in said
    (error,) = errors(tmp_path / mode)
    assert (error["kind"], error["step"]) == (kind, 2)
    assert text in error["message"]
    assert Run(tmp_path / mode).state == "failed"
    assert not psutil.wait_procs(children, timeout=20)[1]


def test_ctrl_c_ends_the_roles(tmp_path: Path) -> None:
    process = started(tmp_path, "wait")
    children = psutil.Process(process.pid).children(recursive=True)
    time.sleep(2.0)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=90)
    assert process.returncode in (-signal.SIGINT, 130)
    assert "KeyboardInterrupt" in said
    assert time.monotonic() - began < 60
    assert Run(tmp_path / "wait").state == "stopped"
    assert [row["step"] for row in rows(tmp_path / "wait")] == [1]
    assert not psutil.wait_procs(children, timeout=20)[1]


CELL = """
import sys
import rlhf
sys.path.insert(0, ROOT)
from examples.loops.grpo import grpo

async with rlhf.start("examples/loops/letters.yaml", SETTINGS) as loop:
    await grpo(loop)
loop.step
"""


def test_a_notebook_awaits_at_the_top_level(tmp_path: Path) -> None:
    """The second cell uses the loop after its block."""
    source = CELL.replace("ROOT", repr(str(ROOT))).replace("SETTINGS", repr(settings(tmp_path, "notebook")))
    cells = [nbformat.v4.new_code_cell(source), nbformat.v4.new_code_cell("await loop.save()")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    execute(notebook, ROOT, allow_errors=True)
    (shown,) = [one["data"]["text/plain"] for one in notebook.cells[0].outputs if one.output_type == "execute_result"]
    assert shown == "3"
    (refused,) = [one for one in notebook.cells[1].outputs if one.output_type == "error"]
    assert refused["traceback"] == [
        "UserError: save: the block of rlhf.start has ended. Make the call within the block."
    ]
    assert len(rows(tmp_path / "notebook")) == 3


def test_a_job_of_a_cluster_joins_the_cluster(head: str, tmp_path: Path) -> None:
    words = " ".join(settings(tmp_path, "job"))
    client = Jobs(head)._client
    job = client.submit_job(entrypoint=f"cd {ROOT} && {sys.executable} examples/loops/grpo.py {words}")
    until = time.monotonic() + 300
    while client.get_job_status(job) not in ("SUCCEEDED", "FAILED", "STOPPED"):
        assert time.monotonic() < until, client.get_job_logs(job)
        time.sleep(1.0)
    log = client.get_job_logs(job)
    assert client.get_job_status(job) == "SUCCEEDED", log[-3000:]
    assert "connected to the Ray cluster" in log
    assert Run(tmp_path / "job").state == "finished"

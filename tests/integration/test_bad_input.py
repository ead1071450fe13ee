"""A user's mistakes before anything runs give exit code 2, the place and the fix in one paragraph, and no Ray.

The tests use the command line's own entry, with the user's code and words. Unit tests have more cases for each part of
the checks. test_failures has the mistakes that only a cluster reveals.
"""

from __future__ import annotations

import fcntl
import functools
import json
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import ray
from huggingface_hub import constants

import actors.cluster.connect
import actors.run.train
from rlhf.cli import main
from rlhf.config.files.load import load
from rlhf.controller.loop import trained_models
from rlhf.models.files import hub
from rlhf.models.files.loading import architecture_fingerprint, load_model_config
from rlhf.preflight.models import with_sources
from rlhf.tracking.run_folder.folder import RunFolder
from tests.integration.recipes import ONLINE, merge, write_config

ROW = '{"prompt": "1+1+1+1=", "answer": "2,3,4"}\n'
GRPO: Mapping[str, Any] = {
    "algorithm": {"name": "grpo"},
    "rewards": {"digits": {"function": "format_regex", "args": {"pattern": "[0-9]"}}},
}


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A run that reaches the cluster fails the test. Relative paths start at the test's folder."""

    @contextmanager
    def forbidden(config: object) -> Iterator[NoReturn]:
        raise AssertionError("the run went on to the cluster")
        yield

    monkeypatch.setattr(actors.run.train, "connected", forbidden)
    monkeypatch.chdir(tmp_path)


def config(folder: Path, *changes: Mapping[str, Any], base: Mapping[str, Any] = GRPO) -> Path:
    """Write a small run in the folder, with the changes in turn."""
    run = {"run": {"name": "r", "dir": "."}}
    return write_config(folder / "run.yaml", {}, functools.reduce(merge, (base, run, *changes), ONLINE))


def connect_to_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run connect to Ray as if this process had no Ray."""
    monkeypatch.setattr(actors.run.train, "connected", actors.cluster.connect.connected)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # the end of the connection must leave the session's Ray alone


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the message of a refusing `rlhf train`: one paragraph of at most some lines, no traceback."""
    code = main(["train", *arguments])
    said = capsys.readouterr().err
    assert code == 2, said
    told = [line for line in said.splitlines() if line.startswith("rlhf: error: ")]
    assert len(told) == 1, said
    assert "Traceback" not in said
    assert len(told[0]) < 900
    return told[0]


def with_data(text: str, **data: Any) -> dict[str, Any]:
    """A run on rows of the user's own."""
    Path("rows.jsonl").write_text(text, encoding="utf-8")
    return {"data": {"train": "rows.jsonl", "eval": None, **data}, "eval": None}


MEMORY = "the limit is reward_policy.memory_gib: 0.5"
MINE = {"rewards": {"mine": {"function": "mine.py:reward"}}, "reward_policy": {"memory_gib": 0.5}}


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"train": {"step": 1}}, None, ["run.yaml:", "train.step", "did you mean train.steps?"]),
        ({"train": {"max_tokens_per_microbatch": 12}}, None, ["train.max_tokens_per_microbatch", "12", "16 + 8 = 24"]),
        ({"policy": {"model": "./nowhere"}}, None, ["policy.model", "./nowhere", "does not exist"]),
        ({"policy": {"model": "nobody/nothing"}}, None, ["policy.model", "nobody/nothing", "HF_HUB_OFFLINE"]),
        ({"data": {"train": "nowhere.jsonl"}}, None, ["data.train", "nowhere.jsonl does not exist"]),
        ({"run": {"dir": "/proc/nowhere"}}, None, ["run.dir", "/proc/nowhere/r", "Choose a folder"]),
        (ROW + '{"question": "1+1="}\n', None, ["data.train: ", "rows.jsonl:2", "found `question`", "data.columns"]),
        (ROW, "def reward(:\n", ["rewards.mine.function: ", "SyntaxError", "mine.py"]),
        (ROW, "table = bytes(2**30)\n", ["rewards.mine.function: importing ", "MemoryError", MEMORY]),
    ],
)
def test_what_the_config_names_is_wrong(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, changes: Any, code: str | None, words: list[str]
) -> None:
    """`changes` is the text of the data file, or changed keys."""
    given = [with_data(changes) if isinstance(changes, str) else changes, {} if code is None else MINE]
    (tmp_path / "mine.py").write_text(code or "")
    base = GRPO if code is None else {"algorithm": {"name": "grpo"}}
    said = refused(capsys, str(config(tmp_path, *given, base=base)))
    assert all(word in said for word in words), said


def test_an_unusable_model_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path) -> None:
    def said_of(name: str, **changes: Any) -> str:
        changed = {"policy": {"model": str(tmp_path / name)}, **changes}
        return refused(capsys, str(config(tmp_path, with_data(ROW), changed)))

    for name in ("garbage", "cut", "bare", "plain"):
        shutil.copytree(tiny_model, tmp_path / name)
    (tmp_path / "garbage" / "model.safetensors").write_bytes(b"\x10garbage" * 10)
    whole = (tmp_path / "cut" / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bare" / "model.safetensors").unlink()
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    (tmp_path / "nothing").mkdir()
    assert "policy.model" in said_of("garbage")
    assert "damaged, incomplete or missing" in said_of("cut")
    assert "no file ends in .safetensors" in said_of("bare")
    assert "policy.model" in said_of("nothing")
    no_template = said_of("plain", data={"apply_chat_template": True})
    assert all(word in no_template for word in ("rows.jsonl:1", "has no chat template", "data.apply_chat_template"))


def test_a_run_folder_that_is_in_use_damaged_or_finished(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = str(config(tmp_path, {}))
    folder = tmp_path / "r"
    folder.mkdir()
    with (folder / ".lock").open("w") as lock:
        lock.write("4711")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = refused(capsys, run)
    assert f"run.name: {tmp_path}/r is in use by process 4711" in said
    (folder / "checkpoints" / "step_000002").mkdir(parents=True)
    said = refused(capsys, run)
    assert "already holds an unfinished run" in said
    assert "--resume auto" in said
    said = refused(capsys, run, "--resume", "auto")
    assert f"{tmp_path}/r/checkpoints/step_000002/manifest.json is missing or damaged" in said
    assert "start again under another run.name, because there is no undamaged checkpoint before this one" in said
    shutil.rmtree(folder)
    (folder / "final").mkdir(parents=True)  # the folder of a finished run
    (folder / "metrics.jsonl").touch()
    assert "r already holds a finished run: its result is in final/; choose another run.name" in refused(capsys, run)
    assert main(["train", run, "--resume", "auto"]) == 0  # starts no Ray
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_a_checkpoint_that_this_run_cannot_go_on_from(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = str(config(tmp_path, with_data(ROW)))

    def resumed_from(*overrides: str, **changes: Any) -> str:
        local = with_sources(load(run).runs["r"], tmp_path / "r")
        model = architecture_fingerprint(load_model_config(local.policy.model))
        trained = trained_models(local)
        cursor = {"epoch": 0, "position": 1, "fingerprint": "of other data"}
        state = {"step": 3, "policy": model, "algorithm": "grpo", "trained": trained, "cursor": cursor, "ahead": []}
        with RunFolder.open(tmp_path, "r", resume=True) as folder:
            state |= changes
            (folder.begin_checkpoint(3) / "controller.json").write_text(json.dumps(state), encoding="utf-8")
            folder.seal(folder.checkpoint(3), step=3)
            folder.commit_checkpoint(3)
        return refused(capsys, run, "--resume", "auto", *overrides)

    assert "cursor belongs to other data: the tokenizer, the weights of data sets, run.seed" in resumed_from()
    assert "is a checkpoint of algorithm dpo, not of grpo" in resumed_from(algorithm="dpo")
    assert "is a checkpoint of another model than policy.model" in resumed_from(policy="another")
    said = resumed_from("policy.lora={rank: 8}")
    assert "cannot be continued by this run: policy.lora is null there and a mapping here. Resume with the" in said
    done = f"train.steps: is 2, but {tmp_path}/r/checkpoints/step_000003 has done 3 steps already"
    assert done in resumed_from("train.steps=2")


def test_what_cannot_be_exported(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def said_of(*arguments: str) -> str:
        assert main(["export", "r", *arguments]) == 2
        (_, said) = capsys.readouterr().err.split("rlhf: error: ")
        return said

    assert "r is not a run folder" in said_of("out")
    with RunFolder.open(tmp_path, "r", resume=False) as folder:
        shutil.copy(config(tmp_path, {}), folder.config)
        for step in (1, 2):
            (folder.begin_checkpoint(step) / "weights").write_text("all of them")
            folder.seal(folder.checkpoint(step), step=step)
            folder.commit_checkpoint(step)
    (tmp_path / "r" / "checkpoints" / "step_000002" / "weights").write_text("some")
    assert "r has no checkpoint step_000007. There are: step_000001, step_000002" in said_of("out", "--step", "7")
    said = said_of("out")
    assert "step_000002/weights has 4 bytes, and manifest.json says 11." in said
    assert "or name another step with --step" in said
    assert "r exists already" in said_of("r", "--step", "1")
    said = said_of("out", "--step", "1", "--merged")
    assert "--merged: the run r has no policy.lora, so its model is whole already" in said
    assert "/proc/nowhere/out cannot be made: No such file or directory" in said_of("/proc/nowhere/out", "--step", "1")


def test_too_large_a_store(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    connect_to_no_ray(monkeypatch)
    said = refused(capsys, str(config(tmp_path, {"cluster": {"object_store_gib": 1e6}})))
    assert "cluster.object_store_gib: is 1e+06, but this machine has only" in said


def test_a_silent_hub_is_asked_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for name, value in (("ENDPOINT", url), ("HF_HUB_OFFLINE", False)):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setattr(hub, "ANSWER_WITHIN_S", 0.5)
        began = time.monotonic()
        code = main(["train", str(config(tmp_path, {"policy": {"model": "nobody/nothing"}}))])
    said = capsys.readouterr().err
    assert code == 2, said
    assert time.monotonic() - began < 60.0  # retries of the libraries would take minutes
    assert f"no hub answers at {url}" in said
    assert "policy.model: The model nobody/nothing" in said


def test_no_ray_at_address(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    connect_to_no_ray(monkeypatch)
    monkeypatch.setattr(actors.cluster.connect, "ANSWER_WITHIN_S", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        for address in (f"127.0.0.1:{port}", "127.0.0.1:1", "ray://127.0.0.1:1", "nowhere.invalid:6379", "nonsense"):
            cluster = {"cluster": {"address": address, "object_store_gib": None}}
            said = refused(capsys, str(config(tmp_path, cluster)))
            assert f"no Ray cluster responds at {address!r} (cluster.address or RAY_ADDRESS)" in said

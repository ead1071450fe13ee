"""A real run whose rewards are services, gated and routed; and a judge on vLLM's own server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import rlhf
from tests.integration.recipes import rows, train, write_config


@contextmanager
def running(words: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A server in a process of its own."""
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, text=True, env={**os.environ, **environment})
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)


def wait_for_url(url: str, process: subprocess.Popen[str], log: Path, *, timeout_s: float) -> None:
    until = time.monotonic() + timeout_s
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.3)


@pytest.mark.slow
def test_a_run_with_a_service_a_gate_and_rows_that_name_their_rewards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "served.py").write_text(
        "def digits(prompts, responses):\n    return [float(sum(c.isdigit() for c in r)) for r in responses]\n"
    )
    data = [{"prompt": f"{i}+{i}=", "answer": str(2 * i), "kind": "sum" if i % 2 else "free"} for i in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    monkeypatch.setenv("DIGITS_TOKEN", "a-token-of-this-test")
    log, port = tmp_path / "served.log", "18731"
    words = [sys.executable, "-m", "rlhf.cli", "serve-reward", f"{tmp_path}/served.py:digits"]
    with running([*words, "--port", port, "--token-env", "DIGITS_TOKEN"], log, OMP_NUM_THREADS="1") as process:
        wait_for_url(f"http://127.0.0.1:{port}/health", process, log, timeout_s=120)
        config = write_config(
            tmp_path / "services.yaml",
            {
                "run": {"name": "services", "dir": str(tmp_path)},
                "algorithm": {"name": "dr_grpo"},
                "data": {"train": str(tmp_path / "data.jsonl"), "eval": str(tmp_path / "data.jsonl")},
                "rollouts": {"prompts_per_step": 4},
                "train": {"steps": 2, "sequences_per_update": 8, "checkpoint_every": 1},
                "rewards": {
                    "digits": {
                        "url": f"http://127.0.0.1:{port}/score",
                        "token_env": "DIGITS_TOKEN",
                        "normalize": "group",
                    },
                    "number": {"function": "format_regex", "args": {"pattern": "(?s).*[0-9].*"}, "gate": "digits"},
                    "right": {"function": "last_number", "only": {"kind": ["sum"]}, "weight": 5.0},
                },
            },
        )
        train(config)
    folder = tmp_path / "services"
    found = rows(folder)
    assert [row["step"] for row in found] == [0, 1, 2]
    for row in found[1:]:
        assert row["rewards/errors/total"] == 0
        assert row["rewards/digits/mean"] >= 0.0
        assert "eval/heldout/digits" in found[0]
    samples = [
        json.loads(line) for path in sorted((folder / "samples").iterdir()) for line in path.read_text().splitlines()
    ]
    for sample in samples:
        told, is_sum = sample["scores"], data[sample["prompt_id"]]["kind"] == "sum"
        assert set(told) == {"digits", "number", *(["right"] if is_sum else [])}
        assert told["digits"] == sum(c.isdigit() for c in sample["response"])
        wanted = told["digits"] + told["number"] * told["digits"] + 5.0 * told.get("right", 0.0)
        assert sample["score"] == pytest.approx(wanted)  # the plain sum, also where training normalises
    everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"a-token-of-this-test" not in everything


@pytest.mark.slow
def test_a_judge_on_vllms_own_server(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "a-key-of-this-test")
    log, port = tmp_path / "vllm.log", "18732"
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_model), "--enforce-eager"]
    words += ["--host", "127.0.0.1", "--port", port, "--api-key", "a-key-of-this-test", "--served-model-name", "judge"]
    with running(words, log, VLLM_CPU_KVCACHE_SPACE="1") as process:
        wait_for_url(f"http://127.0.0.1:{port}/health", process, log, timeout_s=280)
        taste: dict[str, Any] = {
            "url": f"http://127.0.0.1:{port}/v1",
            "token_env": "JUDGE_KEY",
            "judge": {
                "model": "judge",
                "prompt": "Is this answer to `{question}` right? {response}",
                "choices": {"yes": 1.0, "no": -1.0},
                "request": {"temperature": 0.0, "max_tokens": 4, "structured_outputs": {"choice": ["yes", "no"]}},
            },
            "http": {"timeout_s": 60.0, "deadline_s": 120.0},
        }
        config = write_config(
            tmp_path / "judge.yaml",
            {
                "run": {"name": "judge", "dir": str(tmp_path)},
                "algorithm": {"name": "grpo"},
                "rewards": {"taste": taste},
            },
        )
        responses = [{"prompt": "p", "question": "2+2", "response": text} for text in ("4", "5", "4", "a fish")]
        (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in responses))
        found = rlhf.reward(config, tmp_path / "r.jsonl").rows
        assert [row.errors for row in found] == [()] * 4
        assert all(row.score in (1.0, -1.0) for row in found)
        assert found[0].score == found[2].score
        free = ["rewards.taste.judge={model: judge, prompt: 'Hello {response}', request: {max_tokens: 8}}"]
        kinds = {one.kind for row in rlhf.reward(config, tmp_path / "r.jsonl", free).rows for one in row.errors}
        assert kinds == {"not_a_number"}  # this model writes what comes
        refused = rlhf.reward(config, tmp_path / "r.jsonl", ["rewards.taste.judge.model=nobody"]).rows
        assert {one.kind for row in refused for one in row.errors} == {"refused"}

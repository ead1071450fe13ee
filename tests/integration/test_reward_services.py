"""A real run has services as rewards, gated and routed; a judge runs on vLLM's own server, and on `rlhf serve`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlhf
from tests.integration.recipes import rows, train, write_config


@contextmanager
def running(words: list[str], log: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Yield a server in a separate process."""
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
        digits = {"url": f"http://127.0.0.1:{port}/score", "token_env": "DIGITS_TOKEN", "normalize": "group"}
        config = write_config(
            tmp_path / "services.yaml",
            {
                "run": {"name": "services", "dir": str(tmp_path)},
                "algorithm": {"name": "dr_grpo"},
                "data": {"train": str(tmp_path / "data.jsonl"), "eval": str(tmp_path / "data.jsonl")},
                "rollouts": {"prompts_per_step": 4},
                "train": {"steps": 2, "sequences_per_update": 8, "checkpoint_every": 1},
                "rewards": {
                    "digits": digits,
                    "number": {"function": "format_regex", "args": {"pattern": "(?s).*[0-9].*"}, "gate": "digits"},
                    "right": {"function": "last_number", "only": {"kind": ["sum"]}, "weight": 5.0},
                },
            },
        )
        train(config)
    folder = tmp_path / "services"
    found = rows(folder)
    assert [row["step"] for row in found] == [0, 1, 2]
    assert all(row["rewards/errors/total"] == 0 <= row["rewards/digits/mean"] for row in found[1:])
    assert "eval/heldout/digits" in found[0]
    for sample in (json.loads(line) for path in (folder / "samples").iterdir() for line in path.open()):
        told, is_sum = sample["scores"], data[sample["prompt_id"]]["kind"] == "sum"
        assert set(told) == {"digits", "number", *(["right"] if is_sum else [])}
        assert told["digits"] == sum(c.isdigit() for c in sample["response"])
        wanted = told["digits"] + told["number"] * told["digits"] + 5.0 * told.get("right", 0.0)
        assert sample["score"] == pytest.approx(wanted)  # the plain sum, even if training normalises
    everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"a-token-of-this-test" not in everything


def check_judge(folder: Path, port: str, texts: Sequence[str]) -> Sequence[Any]:
    """Judge responses by the server at a port, freely and by choices. Return the verdicts of an unknown model."""
    request = {"temperature": 0.0, "max_tokens": 4, "structured_outputs": {"choice": ["yes", "no"]}}
    prompt = "Is this answer to `{question}` right? {response}"
    judge = {"model": "judge", "prompt": prompt, "choices": {"yes": 1.0, "no": -1.0}, "request": request}
    http = {"timeout_s": 60.0, "deadline_s": 120.0, "max_in_flight": 64}
    taste = {"url": f"http://127.0.0.1:{port}/v1", "token_env": "JUDGE_KEY", "judge": judge, "http": http}
    run = {"run": {"name": "judge", "dir": str(folder)}, "algorithm": {"name": "grpo"}, "rewards": {"taste": taste}}
    config, responses = write_config(folder / "judge.yaml", run), folder / "r.jsonl"
    rows = [{"prompt": "p", "question": "2+2", "response": text} for text in texts]
    responses.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = rlhf.reward(config, responses).rows
    assert [row.errors for row in found] == [()] * len(texts)
    assert all(row.score in (1.0, -1.0) for row in found)
    assert found[0].score == found[2].score
    free = ["rewards.taste.judge={model: judge, prompt: 'Hello {response}', request: {max_tokens: 8}}"]
    kinds = {one.kind for row in rlhf.reward(config, responses, free).rows for one in row.errors}
    assert kinds == {"not_a_number"}  # this model writes random text
    refused = rlhf.reward(config, responses, ["rewards.taste.judge.model=nobody"]).rows
    assert {one.kind for row in refused for one in row.errors} == {"refused"}
    return refused


@pytest.mark.slow
def test_a_judge_on_vllms_own_server(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "a-key-of-this-test")
    log, port = tmp_path / "vllm.log", "18732"
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_model), "--enforce-eager"]
    words += ["--host", "127.0.0.1", "--port", port, "--api-key", "a-key-of-this-test", "--served-model-name", "judge"]
    with running(words, log, VLLM_CPU_KVCACHE_SPACE="1") as process:
        wait_for_url(f"http://127.0.0.1:{port}/health", process, log, timeout_s=280)
        check_judge(tmp_path, port, ("4", "5", "4", "a fish"))


@contextmanager
def serving(model: Path, folder: Path, port: str, *words: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Yield `rlhf serve` after the first answer."""
    log = folder / f"serve{port}.log"
    command = [sys.executable, "-m", "rlhf.cli", "serve", str(model), "--name", "judge", "--port", port, *words]
    with running([*command, "--token-env", "JUDGE_KEY"], log, OMP_NUM_THREADS="1") as process:
        wait_for_url(f"http://127.0.0.1:{port}/health", process, log, timeout_s=200)
        yield process, log


def end(process: subprocess.Popen[str], number: signal.Signals, log: Path) -> None:
    """Tell the server to end; the end is orderly, and no started process is left."""
    below = psutil.Process(process.pid).children(recursive=True)
    assert below
    process.send_signal(number)
    assert process.wait(60) == 0, log.read_text()[-3000:]
    _, alive = psutil.wait_procs(below, timeout=20)
    assert not alive, [one.cmdline() for one in alive]


@pytest.mark.slow
def test_a_judge_on_a_rollout_engine_of_ours(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge reward and OpenAI's own client ask the engine; samples agree with transformers."""
    monkeypatch.setenv("JUDGE_KEY", "a-key-of-this-test")
    port = "18733"
    with serving(tiny_model, tmp_path, port) as (process, log):
        refused = check_judge(tmp_path, port, ("4", "5", "4", "a fish", *map(str, range(60))))
        assert "there is no model nobody" in refused[0].errors[0].message
        ask_as_openai(f"http://127.0.0.1:{port}/v1", tiny_model)
        end(process, signal.SIGINT, log)


def ask_as_openai(url: str, model: Path) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=url, api_key="a-key-of-this-test", max_retries=0)
    assert [one.id for one in client.models.list()] == ["judge"]

    def chat(**more: Any) -> Any:
        return client.chat.completions.create(model="judge", messages=[{"role": "user", "content": "ab"}], **more)

    told = chat(max_completion_tokens=12, temperature=0.0, logprobs=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    messages = [{"role": "user", "content": "ab"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids])
    with torch.no_grad():
        whole = policy.generate(ids, max_new_tokens=12, do_sample=False)
        logprobs = policy(whole).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
    sampled = whole[0, ids.shape[1] :]
    assert told.choices[0].message.content == tokenizer.decode(sampled, skip_special_tokens=True)
    assert told.usage.prompt_tokens == ids.shape[1]
    assert told.usage.completion_tokens == len(sampled)
    expected = [logprobs[place, token].item() for place, token in enumerate(sampled.tolist())]
    assert [one.logprob for one in told.choices[0].logprobs.content] == pytest.approx(expected, abs=1e-4)

    first, second = (chat(n=3, seed=7, max_tokens=16, temperature=0.9) for _ in range(2))
    assert [one.message.content for one in first.choices] == [one.message.content for one in second.choices]
    assert len({one.message.content for one in first.choices}) == 3
    letter = max(first.choices[0].message.content, key=first.choices[0].message.content.count)
    cut = chat(n=3, seed=7, max_tokens=16, temperature=0.9, stop=[letter]).choices[0]
    assert cut.message.content == first.choices[0].message.content.partition(letter)[0]
    assert cut.finish_reason == "stop"
    stream = chat(stream=True, max_tokens=12, temperature=0.0)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == told.choices[0].message.content


@pytest.mark.slow
def test_a_server_whose_engine_is_killed_says_so_and_ends_in_order(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openai = pytest.importorskip("openai")
    monkeypatch.setenv("JUDGE_KEY", "a-key-of-this-test")
    port = "18734"
    url = f"http://127.0.0.1:{port}"
    with serving(tiny_model, tmp_path, port, "--max-length", "256") as (process, log):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="a-key-of-this-test", max_retries=0)
        ask = {"model": "judge", "prompt": "a", "max_tokens": 4}
        assert client.completions.create(**ask).choices
        children = psutil.Process(process.pid).children(recursive=True)
        (engine,) = [one for one in children if "ServingEngine" in " ".join(one.cmdline())]
        engine.kill()
        with pytest.raises(openai.InternalServerError, match="rollout rank 0 died") as told:
            client.completions.create(**ask)
        assert told.value.status_code == 503
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{url}/health", timeout=30)
        end(process, signal.SIGTERM, log)

"""Log lines and the masking of secrets."""

from __future__ import annotations

import logging
import re
import subprocess
import sys

import pytest

from rlhf.tracking import logs


def test_one_event_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", role="policy", rank=1)
    logs.configure("info", role="policy", rank=1)  # replaces, so the line comes once
    logs.set_step(12)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("actors.roles.gang").exception("lost %d ranks", 2)
    logging.getLogger("rlhf.x").debug("hidden")
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ERROR policy/1 step=12 actors\.roles\.gang: lost 2 ranks\\n", line
    )
    assert "ValueError: two" in line


def test_no_secret_is_logged_and_no_terminal_obeys_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("SHORT_TOKEN", "true")  # too short to be one: masking it would garble ordinary text
    monkeypatch.setenv("MAX_TOKENS", "12345678")
    logs.configure()
    logging.getLogger("rlhf.x").info("got %s, true, 12345678, \x1b[2J and \x07", "0123456789abcdef")
    line = capsys.readouterr().err  # outside of a step
    assert line.endswith("Z INFO controller rlhf.x: got ***, true, 12345678, \\x1b[2J and \\x07\n")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("key hf_abcdefghijklmnopqrst.", "key ***."),
        ("Authorization: Bearer abc.def-123456", "Authorization: Bearer ***"),
        ("redis://:pass@host/0 http://me:pw@host", "redis://***@host/0 http://***@host"),
        ("sk-abcdefghijklmnop1234", "***"),
        ("git clone with github_pat_11ABCDEFG0abcdef_hijkl", "git clone with ***"),
        ("GET https://host/a?token=abc&n=1#top", "GET https://host/a?token=***&n=1#top"),
        ("'https://host/?n=1&X-Api-Key=abc'", "'https://host/?n=1&X-Api-Key=***'"),
        ("is monkey=1 a keyboard? tokens=3", "is monkey=1 a keyboard? tokens=3"),
        ("nothing here: max_tokens 12, http://host:80/a@b", "nothing here: max_tokens 12, http://host:80/a@b"),
    ],
)
def test_what_looks_like_a_token_is_masked(text: str, masked: str) -> None:
    assert logs.redact(text) == masked


def test_a_config_is_masked_by_key_and_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-long-secret")
    monkeypatch.setenv("github_pat", "another-secret")
    config = {
        "request": {"headers": [{"X-Api-Key": "x"}], "passphrase": "x", "auth": "x", "author": "x another-secret"},
        "judge": {"api_key": "short", "auth_token": "x", "token_env": "JUDGE", "headers": ["a-long-secret", 1]},
        "args": {"password": 12345678, "credentials": {"user": "bob", "ports": [80], "tls": True}, "cookie": 0},
        "env": {"github_token": "x", "SLACK_TOKEN": "x", "botToken": "x", "HF_TOKEN": "${HF_TOKEN}"},
        "rewards": {"secret": {"function": "found", "weight": 2.0, "args": {"auth": {"user": "bob"}}}},
    }
    assert logs.redact_config(config) == {
        "request": {"headers": [{"X-Api-Key": "***"}], "passphrase": "***", "auth": "***", "author": "x ***"},
        "judge": {"api_key": "***", "auth_token": "***", "token_env": "JUDGE", "headers": ["***", 1]},
        "args": {"password": "***", "credentials": {"user": "***", "ports": ["***"], "tls": True}, "cookie": 0},
        "env": {"github_token": "***", "SLACK_TOKEN": "***", "botToken": "***", "HF_TOKEN": "${HF_TOKEN}"},
        "rewards": {"secret": {"function": "found", "weight": 2.0, "args": {"auth": {"user": "***"}}}},
    }
    names = ["pad_token", "eos_token", "end_token", "stop-token", "cost_per_token", "max_tokens", "tokenizer"]
    plain = {"data": {"eval": {"password": {"task": "calculator"}}}, "password": "", **dict.fromkeys(names, "x")}
    assert logs.redact_config(plain) == plain


def test_libraries_say_nothing_when_they_are_imported() -> None:
    says = "import rlhf, logging; logging.getLogger('bitsandbytes').warning('pip install kernels')"
    done = subprocess.run([sys.executable, "-c", says], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")

"""rlhf eval and rlhf generate with real engines agree with models of known answers, with peft and with a run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import rlhf
from rlhf.cli import main
from rlhf.evaluation.decoding import Decoding
from rlhf.models.files.tiny import ASSISTANT, EOS
from tests.integration.games import chain, config, samples, write_rows
from tests.integration.recipes import ONLINE, merge, train


@pytest.fixture(scope="module")
def says_7(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    follows = {"=": "7", "7": EOS, ASSISTANT: "h", "h": "i", "i": EOS}
    return chain(tiny_model, tmp_path_factory.mktemp("models") / "says_7", follows)


@pytest.fixture(scope="module")
def says_2(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chain(tiny_model, tmp_path_factory.mktemp("models") / "says_2", {"=": "2", "2": EOS})


def test_eval_of_a_run_finds_what_is_known(
    says_7: Path, says_2: Path, tmp_path: Path, ray_local: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three of four answers are 7: the model of 7 is right on those, and wins there against the model of 2."""
    rows = [{"prompt": f"{a}+{b}=", "answer": a + b} for a, b in ((3, 4), (5, 2), (1, 6), (1, 1))]
    held_out = write_rows(tmp_path / "heldout.jsonl", rows)
    changes = {
        "run": {"name": "known", "dir": str(tmp_path)},
        "algorithm": {"name": "grpo"},
        "policy": {"model": str(says_7)},
        "data": {"train": "none.jsonl"},
        "rewards": {"correct": {"function": "last_number"}},
        "eval": {"temperature": 0.8, "samples_per_prompt": 2},
    }
    values = merge(ONLINE, changes)
    values["data"]["eval"] = {"sums": str(held_out)}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    out = tmp_path / "out"
    assert main(["eval", str(config), "--against", str(says_2), "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((out / "eval.json").read_text())
    assert (told["model"], told["against"], told["samples"]) == (str(says_7), str(says_2), 2)
    found = told["sets"]["sums"]
    assert (found["num_rows"], found["num_failed"]) == (4, 0)
    right = {"score", "rewards/correct", "pass@1", "pass@2", "maj@2", "win_rate"}
    values = {name: one["value"] for name, one in found["metrics"].items()}
    assert 0.75 < values.pop("better") < 0.95  # by a bootstrap of three won prompts and one lost
    assert values == {
        **dict.fromkeys(right, 0.75),
        "truncated": 0.0,
        "response_tokens": 2.0,  # the digit and the end of sequence
    }
    assert found["metrics"]["score"]["low"] < 0.75 < found["metrics"]["score"]["high"]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 16
    assert {(row["model"], row["response"], row["answer"]) for row in samples} == {
        (str(says_7), "7", "7"),
        (str(says_2), "2", "2"),
    }
    assert main(["eval", str(config), "--out", str(out)]) == 2  # the file exists already


def test_eval_of_completions_that_the_model_would_give(
    says_7: Path, tmp_path: Path, ray_local: None, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "sums.jsonl", [{"prompt": f"{a}+4=", "completion": "7"} for a in range(5)])
    words = ["eval", str(says_7), "--data", str(data), "--no-apply-chat-template", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert "perplexity" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "eval.json").read_text())["sets"]["sums"]["metrics"]
    assert found["token_accuracy"]["value"] == 1.0
    assert found["perplexity"]["value"] == pytest.approx(math.exp(found["loss"]["value"]))
    assert found["perplexity"]["value"] == pytest.approx(1.0, abs=1e-6)


def test_generate_with_an_adapter_is_what_peft_generates(tiny_model: Path, tmp_path: Path, ray_local: None) -> None:
    """Greedy, in float32: a prompt, and a conversation of a file."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    adapted = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    policy = peft.get_peft_model(base, adapted)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    folder = tmp_path / "run"
    policy.save_pretrained(folder / "final")
    (folder / "config.resolved.yaml").write_text("")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows: list[dict[str, Any]] = [{"prompt": "ab", "answer": 1}, {"messages": [{"role": "user", "content": "cd"}]}]
    data = write_rows(tmp_path / "prompts.jsonl", rows)
    decoding = Decoding(temperature=0.0, max_new_tokens=12)
    answers = rlhf.generate(folder, data, decoding=decoding)
    for text, answer in zip(("ab", "cd"), answers, strict=True):
        turn = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        assert answer.prompt == prompt
        ids = torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids])

        def generated(ids: torch.Tensor = ids) -> torch.Tensor:
            with torch.no_grad():
                return policy.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]

        whole = generated()
        assert answer.response == tokenizer.decode(whole, skip_special_tokens=True)
        assert answer.response_tokens == len(whole)
        assert (answer.finish_reason == "length") == (len(whole) == 12 and whole[-1] != tokenizer.eos_token_id)
        with policy.disable_adapter():
            assert whole.tolist() != generated().tolist()


def test_a_runs_model_answers_as_its_run_asked_it(
    says_7: Path, tmp_path: Path, ray_local: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model says 7 after `=`, and `hi` after the chat template's last token."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "final").symlink_to(says_7)
    (tmp_path / "run" / "config.resolved.yaml").write_text("data: {apply_chat_template: false}\n")
    assert main(["generate", str(tmp_path / "run"), "--prompt", "3+4="]) == 0
    out, err = capsys.readouterr()
    assert out == "7\n"
    assert "apply_chat_template false" in err
    assert main(["generate", str(tmp_path / "run"), "--prompt", "3+4=", "--apply-chat-template"]) == 0
    assert capsys.readouterr().out == "hi\n"


@pytest.mark.slow
def test_a_conversation_through_a_pipe(says_7: Path, tmp_path: Path) -> None:
    """Each line but blank ones is a turn; only responses go to stdout, and the end of input is the end."""
    command = [Path(sys.executable).with_name("rlhf"), "generate", says_7, "--chat", "--system-prompt", "Be brief."]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 280, "cwd": tmp_path}
    done = subprocess.run(command, input="hello\n\nagain", env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)
    assert (done.returncode, done.stdout) == (0, "hi\nhi\n"), done.stderr


MOODY_GAME = Path(__file__).parents[1] / "fixtures" / "environments" / "moody_game.py"
SAMPLES = 4


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def guesses(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that names a number from 1 to 7, all equally likely: three turns win a third of the games."""
    follows = {ASSISTANT: "1234567", **dict.fromkeys("1234567", EOS)}
    return chain(tiny_model, tmp_path_factory.mktemp("models") / "guesses", follows, logit=12.0)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_it_plays_the_games_that_the_run_played(
    guesses: Path, tmp_path: Path, ray_local: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The final model of a run has the weights of the last evaluation, so the games are the same turn by turn. Both
    leave out prompts whose environment raises, hangs or ends; such prompts are recorded, and never count as 0."""
    moods = [*["well"] * 7, "raise", "hang", "exit"]
    games = [
        {"messages": [{"role": "user", "content": "1-7?"}], "secret": index % 7 + 1, "mood": mood}
        for index, mood in enumerate(moods)
    ]
    grading = {"pass_score": 1.0, "answer": "last_number", "by": "mood"}
    written = config(
        tmp_path,
        "game",
        algorithm={"name": "grpo"},
        policy={"model": str(guesses), "dtype": "float32"},
        data={"eval": str(write_rows(tmp_path / "games.jsonl", games))},
        rollouts={"environment": {"name": f"{MOODY_GAME}:MoodyGame", "step_timeout_s": 3.0}},
        rewards={"digits": {"weight": 0.0}},
        reward_policy={"on_error": "drop"},
        train={"steps": 1},
        eval={"at_start": False, "temperature": 1.0, "samples_per_prompt": SAMPLES, **grading},
    )
    train(written)
    out = tmp_path / "out"
    assert main(["eval", str(written), "--model", str(tmp_path / "game"), "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    during = json.loads((tmp_path / "game" / "evals" / "step_000001.json").read_text(encoding="utf-8"))
    assert told["sets"] == during["sets"]
    assert set(told["sets"]) == {"heldout", "heldout.well"}  # the sets of failed prompts have no result
    heldout = told["sets"]["heldout"]
    assert (heldout["num_rows"], heldout["num_failed"]) == (7, 3)
    found = heldout["metrics"]
    assert {"rewards/won", "rewards/digits", "pass@2", "maj@4", "truncated", "response_tokens"} <= set(found)
    score = found["score"]
    assert 0.0 < score["low"] < score["value"] < score["high"] < 1.0
    assert found["pass@1"]["value"] == pytest.approx(score["value"])
    assert found["pass@4"]["value"] > score["value"]

    played = lines(out / "samples.jsonl")
    theirs = [one for one in samples(tmp_path / "game", 1) if one["split"] == "heldout"]
    assert len(played) == len(theirs) == 7 * SAMPLES
    same = ("prompt_id", "sample", "prompt", "response", "score", "scores", "truncated", "response_tokens", "turns")
    for one, other in zip(played, theirs, strict=True):
        assert {name: one[name] for name in same} == {name: other[name] for name in same}
        for part in ("ids", "texts", "sampled"):
            assert one["tokens"][part] == other["tokens"][part]
        assert one["tokens"]["sampled"].count(True) == one["response_tokens"]
        assert one["passed"] == (one["scores"]["won"] == 1.0)

    def failures(folder: Path) -> list[tuple[Any, ...]]:
        return sorted((one["source"], one["prompt_id"], one["sample"], one["kind"]) for one in lines(folder))

    assert failures(out / "errors.jsonl") == failures(tmp_path / "game" / "errors.jsonl")
    assert failures(out / "errors.jsonl") == [
        ("environment", prompt_id, sample, kind)
        for prompt_id, kind in ((7, "raised"), (8, "timeout"), (9, "died"))
        for sample in range(SAMPLES)
    ]

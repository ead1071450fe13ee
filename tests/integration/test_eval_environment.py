"""rlhf eval of a run with an environment plays the same games, with the same failures, as the run's own evaluations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import main
from rlhf.models.files.tiny import ASSISTANT, EOS
from tests.integration.games import chain, config, samples, write_rows
from tests.integration.recipes import train

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
    """The final model of a run has the weights of the last evaluation, so the games are the same turn by turn. Prompts
    with an environment that raises, hangs or ends are left out of both, recorded and never counted as 0."""
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
    assert set(told["sets"]) == {"heldout", "heldout.well"}  # of the others nothing is known
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

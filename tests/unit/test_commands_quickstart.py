"""The quickstart's verdict on a run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import rlhf.commands.quickstart as quickstart_command
from rlhf.commands.quickstart import quickstart, show_improvement
from rlhf.errors import RunError


def write(folder: Path, scores: list[float]) -> None:
    """Write a run with evaluations at steps 0, 10, 20, ..., and the answers to a prompt at the first and last step."""
    (folder / "samples").mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        for index, score in enumerate(scores):
            row = {"step": 10 * index, "time_s": 1.0, "eval/heldout/score": score}
            file.write(json.dumps(row) + "\n" + json.dumps({"step": 10 * index + 1, "time_s": 1.0}) + "\n")
    for step, response in ((0, "[b]9,10"), (10 * (len(scores) - 1), "11,19")):
        row = {"prompt_id": 4, "prompt": "8+3=", "response": response, "score": float(response == "11,19")}
        rows = [{"split": split, **row} for split in ("heldout", "train")]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "samples" / f"step_{step:06d}.jsonl").write_text(text)


def test_a_run_that_learnt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, [0.4, 0.3, 0.9])
    show_improvement(tmp_path, is_recipe=True)
    out = capsys.readouterr().out
    assert "8+3=" in out
    assert "[b]9,10 [0" in out
    assert "11,19 [1" in out
    assert "held-out accuracy 0.40 -> 0.90" in out
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([0.4, 0.84], r"after training is 0\.84, expected at least 0\.85"),
        ([0.1, 0.9], r"after the warm start is 0\.10, expected 0\.2 to 0\.7"),
        ([0.8, 0.9], r"after the warm start is 0\.80, expected 0\.2 to 0\.7"),
        ([0.4], "no evaluation before and after training"),
    ],
)
def test_a_run_that_did_not_get_there(tmp_path: Path, scores: list[float], message: str) -> None:
    write(tmp_path, scores)
    with pytest.raises(RunError, match=message):
        show_improvement(tmp_path, is_recipe=True)
    show_improvement(tmp_path, is_recipe=False)


@pytest.mark.parametrize(
    ("overrides", "is_recipe"),
    [
        ([], True),
        (["run.name=mine", "run.dir=elsewhere", "cluster.object_store_gib=0.5", "stages.sft.train.steps=780"], True),
        (["stages.sft.train.steps=40"], False),
        (["stages.ppo.train.lr=1e-3"], False),
        (["policy.dtype=bfloat16"], False),
        (
            [
                "cluster.roles.teacher.colocate_with=null",  # valid only together with the next override
                "stages.ppo.algorithm={name: on_policy_distillation}",
                "stages.ppo.teacher={model: 'stage:sft'}",
            ],
            False,
        ),
    ],
)
def test_only_the_recipe_is_judged(monkeypatch: pytest.MonkeyPatch, overrides: list[str], is_recipe: bool) -> None:
    judged: list[bool] = []
    monkeypatch.setattr(quickstart_command, "train", lambda *_, **__: None)
    monkeypatch.setattr(quickstart_command, "show_improvement", lambda _, is_recipe: judged.append(is_recipe))
    quickstart("ppo", overrides)
    assert judged == [is_recipe]

"""An evaluation inside a run writes records, and errors end the evaluation. Roles give scripted answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.config.schema.root import Config
from rlhf.controller.evaluation import EvalSet, score_held_out
from rlhf.controller.rollout_scorer import RolloutScorer
from rlhf.errors import RunError
from rlhf.evaluation.passing import PassRule
from rlhf.evaluation.results import Marking
from rlhf.evaluation.voting import AnswerForm
from rlhf.roles import CompletedGroup
from rlhf.suites.spec import Question, SuiteAnswers, SuiteSpec
from rlhf.tracking.run_folder.folder import evaluation_path
from rlhf.tracking.run_folder.samples import samples_path
from rlhf.types import GroupRequest, GroupScores, Prompt
from tests.fakes.configs import online_config
from tests.fakes.groups import completed_group
from tests.fakes.records import BareRecord
from tests.fakes.roles import FakeEngines, FakeRewards, failed_reward

TEXTS = {0: ("7", "7", "8", "9"), 1: ("5", "6", "5", "6")}  # the answers are 7 and 6
MARKING = Marking(ks=(1, 2), passing=PassRule(judges={"right": None}, pass_score=None), answers="last_number")


class Engines(FakeEngines):
    """Engines whose nth response to a prompt has n tokens. A single response is the greedy response."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, float]] = []

    def complete(self, request: GroupRequest, version: int) -> CompletedGroup:
        self.asked.append((len(request.seeds), self.samplings[-1].temperature))
        group: CompletedGroup = completed_group(request, SimpleNamespace(), tokens=range(1, len(request.seeds) + 1))
        return group


class Rewards(FakeRewards):
    """A reward of 1 for the prompt's answer. `broken`: the prompts for which the reward `failing` fails."""

    def __init__(self, broken: Sequence[int] = (), failing: str = "right") -> None:
        super().__init__()
        self.broken, self.failing = broken, failing

    async def score(self, group: CompletedGroup) -> GroupScores:
        prompt = group.request.prompt
        if prompt.prompt_id in self.broken:
            return GroupScores(scores=(), by_name={}, errors=(failed_reward(prompt.prompt_id, self.failing),))
        said = TEXTS[prompt.prompt_id][: len(group.infos)]
        scores = tuple(float(text == prompt.columns["answer"]) for text in said)
        return GroupScores(scores=scores, by_name={"right": scores}, errors=())

    async def answers(self, group: CompletedGroup, form: AnswerForm) -> tuple[str | None, ...]:
        assert form == "last_number"
        return TEXTS[group.request.prompt.prompt_id]


def config(**sections: Any) -> Config:
    evaluation = {"temperature": 1.0, "samples_per_prompt": 4, **sections.pop("eval", {})}
    return online_config(
        data={"eval": "y.jsonl"},
        rollouts={"samples_per_prompt": 4},
        rewards={"right": {"function": "last_number"}},
        eval=evaluation,
        **sections,
    )


PROMPTS = tuple(
    Prompt(prompt_id=i, token_ids=(1, 2), text=f"p{i}", columns={"answer": answer, "task": task})
    for i, (answer, task) in enumerate((("7", "easy"), ("6", "hard")))
)


async def run(run_config: Config, tmp_path: Path, rewards: Rewards, engines: Engines | None = None) -> Any:
    record: Any = BareRecord(tmp_path / "run")
    scorer = RolloutScorer(engines or Engines(), rewards, record, rewards_fingerprint="")
    sets = {"heldout": EvalSet(prompts=PROMPTS, sources={0: "easy", 1: "hard"})}
    await score_held_out(sets, run_config, MARKING, scorer, step=3)  # type: ignore[arg-type]
    return record


async def test_metrics_by_hand(tmp_path: Path) -> None:
    """Prompt 0: 7 7 8 9, two right. Prompt 1: 5 6 5 6, two right. pass@2 = 1 - C(2,2)/C(4,2) = 5/6 for both.

    maj@2 of prompt 0: of 6 pairs, 77 wins, 4 pairs of 7 with another answer count half, and 89 loses: 3/6. Of prompt 1:
    66 wins, and the 4 mixed pairs count half: 3/6.
    """
    record = await run(config(), tmp_path, Rewards())
    values = {"score": 0.5, "right": 0.5, "pass@2": 5 / 6, "maj@2": 0.5}
    assert {name: record.row[f"eval/heldout/{name}"] for name in values} == pytest.approx(values)
    assert record.row["eval/heldout.easy/pass@1"] == 0.5
    assert record.row["eval/heldout.hard/response_tokens"] == 2.5
    assert record.row["eval/heldout/score_low"] <= 0.5 <= record.row["eval/heldout/score_high"]
    assert "eval/heldout/greedy" not in record.row
    assert told(record)["heldout.easy"]["metrics"]["score"] == {"value": 0.5, "low": None, "high": None}


def told(record: Any) -> Any:
    return json.loads(evaluation_path(record.folder.path, 3).read_text())["sets"]


async def test_a_suite_is_asked_over_the_fronts_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without held-out prompts asks its suites alone. One of two questions is right."""
    asked: list[Any] = []

    async def ask(spec: SuiteSpec, fronts: Any, **settings: Any) -> list[SuiteAnswers]:
        asked.append((spec.names, await fronts("key", "suites"), settings["deadline_s"]))
        shared: Any = {"task": None, "prompt": "2+2?", "target": "4", "values": {"acc": 1.0}, "truncated": False}
        shared |= {"response_tokens": 1, "failure": None}
        questions = [Question(number=i, response=str(4 + i), score=1.0 - i, **shared) for i in range(2)]
        return [SuiteAnswers(name="sums", questions=tuple(questions))]

    monkeypatch.setattr("rlhf.controller.evaluation.ask_suites", ask)
    record: Any = BareRecord(tmp_path / "run")
    scorer = RolloutScorer(Engines(), Rewards(), record, rewards_fingerprint="")
    spec, run_config = SuiteSpec(names=("sums",), tokenizer="t"), config()
    await score_held_out({}, run_config, MARKING, scorer, step=3, suites=spec)
    assert asked == [(("sums",), (), run_config.cluster.call_timeout_s)]
    assert (record.row["eval/sums/score"], record.row["eval/sums/acc"]) == (0.5, 1.0)
    assert told(record)["sums"]["num_rows"] == 2
    lines = samples_path(record.folder.scratch, 3).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(row["split"], row["response"], row["score"], row["min_version"]) for row in rows] == [
        ("sums", "4", 1.0, 3),
        ("sums", "5", 0.0, 3),
    ]
    assert rows[0]["columns"] == {"target": "4"}


async def test_greedy_answers_are_asked_for_beside_the_sampled_ones(tmp_path: Path) -> None:
    """The greedy answers are `7` and `5`, and `7` is right."""
    engines, rewards = Engines(), Rewards()
    record = await run(config(eval={"greedy": True}), tmp_path, rewards, engines)
    assert record.row["eval/heldout/greedy"] == 0.5
    assert engines.asked == [(4, 1.0), (4, 1.0), (1, 0.0), (1, 0.0)]
    assert [len(selection.records) for selection in rewards.written] == [4, 4]


async def test_a_reward_that_fails_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"eval heldout, step 3: .*`right` raised"):
        await run(config(), tmp_path, Rewards(broken=[1]))


@pytest.mark.parametrize(
    ("failing", "on_error"), [("agent", "fail"), ("right", "drop")], ids=["a session", "a reward with on_error: drop"]
)
async def test_a_prompt_without_a_score_is_left_out_and_recorded(tmp_path: Path, failing: str, on_error: str) -> None:
    dropping = config(reward_policy={"on_error": on_error})
    record = await run(dropping, tmp_path, Rewards(broken=[1], failing=failing))
    assert record.row["eval/heldout/pass@2"] == pytest.approx(5 / 6)
    assert "eval/heldout.hard/score" not in record.row
    assert [(error.split, error.prompt_id, error.source) for error in record.errors] == [("heldout", 1, failing)]
    assert told(record)["heldout"]["num_failed"] == 1
    with pytest.raises(RunError, match="eval heldout, step 3"):
        await run(dropping, tmp_path / "all", Rewards(broken=[0, 1], failing=failing))

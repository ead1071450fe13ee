"""A resumed run reuses a group's scores only for the same weights, request and row."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf.controller.evaluation import EvalSet, score_held_out
from rlhf.controller.rollout_scorer import GREEDY_GROUPS, RolloutScorer, request_for
from rlhf.errors import ResultsLost
from rlhf.evaluation.results import Marking
from rlhf.roles import CompletedGroup, ScoredGroup
from rlhf.rollouts.records.spool import group_path, stored_groups
from rlhf.types import GroupScores, Prompt, Sampling
from tests.fakes.configs import online_config
from tests.fakes.records import BareRecord
from tests.fakes.roles import FakeEngines, FakeRewards, failed_reward

PROMPTS = [Prompt(prompt_id=i, token_ids=(1, 2), text="", columns={"answer": "3"}) for i in range(2)]
SAMPLING = Sampling(max_new_tokens=4)


def begun(folder: Path, *, logprob: float = -0.5) -> tuple[RolloutScorer, FakeRewards, Any]:
    """Return a run on the folder, as made by each start of the run. The score is the prompt's number."""
    reward, record = (
        FakeRewards({prompt.prompt_id: (float(prompt.prompt_id),) for prompt in PROMPTS}),
        BareRecord(folder),
    )
    engines: Any = (FakeEngines(mean_logprob=logprob, num_response_tokens=1), reward, record)
    return RolloutScorer(*engines, rewards_fingerprint="f"), reward, record


def ask(
    scorer: RolloutScorer,
    *,
    version: int = 0,
    sampling: Sampling = SAMPLING,
    prompts: Sequence[Prompt] = PROMPTS,
    run_seed: int = 0,
) -> list[int]:
    requests = [
        request_for(prompt, group_id=i, first_sequence_id=i, samples=1, run_seed=run_seed)
        for i, prompt in enumerate(prompts)
    ]
    scored = asyncio.run(scorer.score_all(requests, sampling, step=1, version=version))
    return [one.group.request.group_id for one in scored]


def test_answers_come_in_the_order_of_their_requests_and_are_taken_up_again(tmp_path: Path) -> None:
    first, reward, _ = begun(tmp_path)
    assert ask(first, version=0) == [0, 1]
    assert sorted(reward.scored) == [0, 1]
    again, reward, _ = begun(tmp_path)
    assert ask(again, version=0) == [0, 1]
    assert reward.scored == []
    assert ask(again, version=1) == [0, 1]
    assert sorted(reward.scored) == [0, 1]


def test_a_group_whose_tokens_are_lost_with_a_node_is_scored_as_the_store_has_it(tmp_path: Path) -> None:
    scorer, reward, _ = begun(tmp_path)
    given: list[Any] = []

    async def score(group: CompletedGroup) -> GroupScores:
        given.append(group.rollouts)
        if group.rollouts is None:
            raise ResultsLost("the node is gone.", role="reward", rank=0, stage="rewards", kind="died")
        return await FakeRewards.score(reward, group)

    async def restored(group: CompletedGroup, sampling: Sampling) -> CompletedGroup:
        stored: Any = f"stored {group.request.group_id}"
        return dataclasses.replace(group, rollouts=stored)

    scorer.reward.score = score  # type: ignore[method-assign]
    scorer.rollout.restored = restored  # type: ignore[method-assign]
    ask(scorer)
    assert sorted(map(str, given)) == ["None", "None", "stored 0", "stored 1"]
    assert sorted(reward.scored) == [0, 1]


def test_a_checkpoint_deletes_no_file_that_an_engine_writes(tmp_path: Path) -> None:
    """In flight, an engine renames the file of a finished group into place at any moment."""
    scorer = begun(tmp_path)[0]
    for group_id in (-1, 3, 4):
        group_path(scorer.spool, group_id, 2).write_bytes(b"tokens")
    writing = group_path(scorer.spool, 5, 2).with_suffix(".77.tmp")
    writing.write_bytes(b"tok")
    ask(scorer)
    scorer.retain_from(4)
    assert list(stored_groups(scorer.spool).values()) == [4]
    assert writing.exists()


def test_groups_travel_with_a_checkpoint_in_one_file(tmp_path: Path) -> None:
    here, there = begun(tmp_path / "here")[0], begun(tmp_path / "there")[0]
    for group_id in (3, 4, 5):
        group_path(here.spool, group_id, 2).write_bytes(b"tokens of %d" % group_id)
    ask(here)
    here.save_to(tmp_path / "checkpoint", start=4)
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == [
        "firsts.jsonl",
        "groups.tar",
        "scores.jsonl",
    ]
    group_path(there.spool, 4, 2).write_bytes(b"half of")
    there.restore_from(tmp_path / "checkpoint")
    assert {group_id: path.read_bytes() for path, group_id in stored_groups(there.spool).items()} == {
        4: b"tokens of 4",
        5: b"tokens of 5",
    }
    assert not list(there.spool.glob(".*.partial"))


@pytest.mark.parametrize(
    "changed",
    [
        {"sampling": Sampling(max_new_tokens=2)},
        {"sampling": Sampling(max_new_tokens=4, temperature=0.5)},
        {"sampling": Sampling(max_new_tokens=4, stop=(";",))},
        {"prompts": [dataclasses.replace(prompt, columns={"answer": "4"}) for prompt in PROMPTS]},
        {"prompts": [dataclasses.replace(prompt, token_ids=(1, 3)) for prompt in PROMPTS]},
        {"prompts": [dataclasses.replace(prompt, text="as a reward is told it") for prompt in PROMPTS]},
        {"run_seed": 1},
    ],
)
def test_what_was_drawn_or_asked_otherwise_is_scored_again(tmp_path: Path, changed: dict[str, Any]) -> None:
    ask(begun(tmp_path)[0])
    again, reward, _ = begun(tmp_path)
    ask(again, **changed)
    assert sorted(reward.scored) == [0, 1]
    once_more, reward, _ = begun(tmp_path)
    ask(once_more, **changed)
    assert reward.scored == []
    other, reward, _ = begun(tmp_path, logprob=-0.75)  # the spool is lost, and a GPU rounds differently
    ask(other, **changed)
    assert sorted(reward.scored) == [0, 1]


@pytest.mark.parametrize(("before", "asks"), [(1, True), (0, False)])
def test_an_evaluation_is_taken_up_by_the_weights_of_its_own_step(tmp_path: Path, before: int, asks: bool) -> None:
    config = online_config(data={"eval": "y.jsonl"}, eval={"temperature": 0.0})
    sets = {"heldout": EvalSet(prompts=tuple(PROMPTS), sources={})}
    marking = Marking(ks=(1,), passing=None, answers=None)

    def evaluated(step: int) -> FakeRewards:
        scorer, reward, _ = begun(tmp_path)
        asyncio.run(score_held_out(sets, config, marking, scorer, step=step))
        return reward

    assert len(evaluated(before).scored) == 2
    assert bool(evaluated(0).scored) is asks


def test_a_failure_is_recorded_with_the_set_of_its_prompt(tmp_path: Path) -> None:
    """Each data set counts prompts from 0."""
    scorer, reward, record = begun(tmp_path)
    reward.fails = {0, -1}
    for group_id, split in ((0, "train"), (-1, "heldout")):
        request = request_for(PROMPTS[0], group_id=group_id, first_sequence_id=0, samples=1, run_seed=0)
        asyncio.run(scorer.score_all([request], SAMPLING, step=1, version=0, split=split))
    assert [(error.split, error.prompt_id) for error in record.errors] == [("train", 0), ("heldout", 0)]


def ask_with_greedy(scorer: RolloutScorer, sampling: Sampling = SAMPLING) -> list[ScoredGroup]:
    requests = [
        request_for(prompt, group_id=5 + i, first_sequence_id=2 * i, samples=2, run_seed=0)
        for i, prompt in enumerate(PROMPTS)
    ]

    async def both() -> list[ScoredGroup]:
        groups = await scorer.score_all(requests, sampling, step=1, version=0)
        return await scorer.add_greedy_baseline(groups, sampling, step=1, version=0)

    return asyncio.run(both())


def test_each_prompt_is_answered_greedily_too_and_that_is_taken_up_again(tmp_path: Path) -> None:
    scorer, reward, _ = begun(tmp_path)
    sampling = Sampling(max_new_tokens=4, temperature=0.7, top_p=0.9, top_k=3, stop=(";",))
    found = ask_with_greedy(scorer, sampling)
    assert [one.group.request.group_id for one in found] == [5, 6]
    assert [one.greedy_score for one in found] == [0.0, 1.0]
    assert [one.greedy_tokens for one in found] == [1, 1]
    assert sorted(reward.scored) == [5, 6, 5 + GREEDY_GROUPS, 6 + GREEDY_GROUPS]
    engines: Any = scorer.rollout
    assert engines.samplings[1] == Sampling(max_new_tokens=4, temperature=0.0, stop=(";",))
    again, reward, _ = begun(tmp_path)
    assert [one.greedy_score for one in ask_with_greedy(again, sampling)] == [0.0, 1.0]
    assert reward.scored == []


def test_a_group_whose_greedy_response_was_not_scored_has_failed(tmp_path: Path) -> None:
    scorer, reward, _ = begun(tmp_path)
    reward.fails = {6 + GREEDY_GROUPS}
    found = ask_with_greedy(scorer)
    assert [one.scores.errors for one in found] == [(), (failed_reward(prompt_id=1),)]
    reward.fails = {5}
    reward.scored.clear()
    broken, _, _ = begun(tmp_path / "other")
    broken.reward = reward  # type: ignore[assignment]
    found = ask_with_greedy(broken)
    assert [bool(one.scores.errors) for one in found] == [True, False]
    assert 5 + GREEDY_GROUPS not in reward.scored  # the greedy response's group is lost already

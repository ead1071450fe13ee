"""A batch has the right prompts: filtered, dropped, oversampled or skipped; none is lost or repeated, even after a
resume."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.schema.rollouts import DynamicSampling
from rlhf.controller.collect import is_within
from rlhf.errors import RunError
from rlhf.roles import CompletedGroup
from rlhf.rollouts.records.ledgers import request_identity
from rlhf.tracking.run_folder.group_ledger import GroupRecord
from rlhf.types import GroupRequest, GroupScores, Sampling, StepReward
from tests.fakes.collecting import FAILED, SOLVED, VARIED, Run, by_prompt, slowest


def test_bounds_of_the_mean_score() -> None:
    bounded = DynamicSampling(min_mean=0.25, max_mean=0.5)
    assert [is_within(mean, bounded) for mean in (0.2, 0.25, 0.5, 0.55)] == [False, True, True, False]


def told(run: Run, scores: Sequence[float], **by_name: Sequence[float]) -> Run:
    """Give prompts of odd ids the scores; responses to all other prompts differ."""

    async def score(group: CompletedGroup) -> GroupScores:
        if group.request.prompt.prompt_id % 2:
            parts = {name: tuple(values) for name, values in by_name.items()}
            return GroupScores(scores=tuple(scores), by_name=parts or {"r": tuple(scores)}, errors=())
        varied = tuple(float(i % 2) for i in range(len(scores)))
        return GroupScores(scores=varied, by_name=dict.fromkeys(by_name or ["r"], varied), errors=())

    run.score = score  # type: ignore[method-assign]
    return run


# Each of three rewards is compared alone: two have the deviation 1/2, and one has sqrt(1/3).
DIFFER = {"a": (1.0, 0.0, 0.0, 0.0), "b": (0.0, 1.0, 0.0, 0.0), "c": (0.0, 0.0, 1.0, 1.0)}
CANCEL_OUT = {"a": (1.0, 0.0, 0.0, 1.0), "b": (0.0, 1.0, 1.0, 0.0), "c": (0.0,) * 4}


@pytest.mark.parametrize(
    ("algorithm", "scores", "by_name", "learns"),
    [
        ("gdpo", (1.0,) * 4, DIFFER, True),
        ("grpo", (1.0,) * 4, DIFFER, False),
        ("gdpo", (1.0,) * 4, CANCEL_OUT, False),
        ({"name": "pass_at_k", "k": 2}, (1.0, 1.0, 1.0, 0.0), {}, False),  # each set of two has a best response
        ("grpo", (1.0, 1.0, 1.0, 0.0), {}, True),
    ],
)
def test_a_group_teaches_where_the_algorithm_tells_its_responses_apart(
    tmp_path: Path, algorithm: Any, scores: Sequence[float], by_name: dict[str, Any], learns: bool
) -> None:
    rewards = {name: {"function": "f"} for name in by_name}
    run = Run(tmp_path, algorithm=algorithm, rewards=rewards, samples_per_prompt=4, dynamic_sampling={})
    assert told(run, scores, **by_name).trained() == ([0, 1, 2, 3] if learns else [0, 2, 4, 6])


def test_what_compares_no_responses_is_filtered_by_the_mean_alone(tmp_path: Path) -> None:
    """A solved group has a gradient if the baseline is a critic or the whole batch."""
    for name in ("ppo", "reinforce", "remax"):
        run = Run(tmp_path / name, algorithm=name, dynamic_sampling={"max_mean": 0.9})
        assert told(run, (0.5, 0.5)).trained() == [0, 1, 2, 3]
        assert told(run, (1.0, 1.0)).trained(2) == [4, 6, 8, 10]


def test_lengths_tell_responses_apart_and_masked_responses_teach_nothing(tmp_path: Path) -> None:
    dapo = {"name": "dapo", "overlong": {"buffer": 2}}
    run = Run(tmp_path / "dapo", lambda _: SOLVED, algorithm=dapo, dynamic_sampling={}, max_new_tokens=4)
    run.engines.lengths = (2, 4)
    assert run.trained() == [0, 1, 2, 3]
    masks = {"name": "grpo", "mask_truncated": True}
    run = Run(tmp_path / "masks", algorithm=masks, dynamic_sampling={})
    run.engines.cut = frozenset({1, 2})
    assert run.trained() == [0, 3, 4, 5]


def test_groups_that_teach_nothing_are_replaced_until_the_batch_is_whole(tmp_path: Path) -> None:
    run = Run(tmp_path, by_prompt(solved=[0, 2, 4], failed=[5]), order=lambda r: r[::-1], dynamic_sampling={})
    batch = run.collect()
    assert run.engines.requests == [[0, 1, 2, 3], [4, 5], [6, 7]]
    assert [one.group.request.prompt.prompt_id for one in batch.groups] == [1, 3, 6, 7]
    # A sequence id is the prompt's place among the requests, times two samples.
    assert [one.group.infos[0].sequence_id for one in batch.groups] == [2, 6, 12, 14]
    row = run.row
    assert row["rollouts/filtered_groups/fraction"] == 4 / 8
    assert (row["rollouts/filtered_easy/fraction"], row["rollouts/filtered_hard/fraction"]) == (3 / 8, 1 / 8)
    assert row["rewards/answered_score/mean"] == (4 * 1.0 + 3 * 2.0) / 16
    assert row["rollouts/tokens/total"] == 4 * 2 * (2 + 3)  # tokens of skipped groups; the batch's come elsewhere
    assert batch.sampled_tokens == 8 * 2 * 3
    second = run.collect(2).groups
    assert [one.group.request.prompt.prompt_id for one in second] == [8, 9, 10, 11]
    assert [one.group.infos[0].sequence_id for one in second] == [0, 2, 4, 6]


def test_too_many_filtered_groups_end_the_run(tmp_path: Path) -> None:
    bounded: dict[str, Any] = {"dynamic_sampling": {"max_filtered_fraction": 2}}
    run = Run(tmp_path / "large", by_prompt(failed=range(3, 20), solved=range(3)), prompts=20, **bounded)
    with pytest.raises(
        RunError,
        match=r"step 1: 12 groups were filtered, more than rollouts\.dynamic_sampling\.max_filtered_fraction 2 of 4 "
        r"prompts allows, and 0 were kept\. The mean scores of the filtered groups are 0 to 1\. Choose other prompts",
    ):
        run.collect()
    small = Run(tmp_path / "small", lambda _: SOLVED, prompts=6, **bounded)
    with pytest.raises(
        RunError, match=r"All 6 prompts of data\.train were tried, and this policy can learn from no further prompt"
    ):
        small.collect()


def test_a_batch_whose_tokens_are_all_restricted_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    forgotten: list[bool] = []
    monkeypatch.setattr(run.scorer, "forget_untrained", lambda: forgotten.append(True))
    run.engines.restricted = {"response_format": 1, "tool_choice": 2}
    run.collect()  # some tokens are not restricted
    assert not forgotten
    run.engines.lengths = (0, 0)
    with pytest.raises(
        RunError,
        match=r"step 2: a grammar restricted all sampled tokens of the batch \(tool_choice: 16, response_format: 8\), "
        r".*ask with tool_choice auto",
    ):
        run.collect(2)
    assert forgotten


def test_the_share_of_filtered_groups_is_of_the_steps_prompts(tmp_path: Path) -> None:
    bounded: dict[str, Any] = {"dynamic_sampling": {"max_filtered_fraction": 0.5}}
    assert Run(tmp_path / "at", by_prompt(failed=[0, 1]), **bounded).trained() == [2, 3, 4, 5]
    with pytest.raises(RunError, match="3 groups were filtered"):  # 0.5 * 4 = 2
        Run(tmp_path / "above", by_prompt(failed=[0, 1, 4]), **bounded).collect()


@pytest.mark.parametrize(
    ("of_reward", "of_run", "drops"),
    [(None, "fail", False), (None, "drop", True), ("drop", "fail", True), ("fail", "drop", False)],
)
def test_a_failed_reward_ends_the_run_or_has_its_group_replaced(
    tmp_path: Path, of_reward: str | None, of_run: str, drops: bool
) -> None:
    """The reward's own rule overrides the rule of the run."""
    reward = {} if of_reward is None else {"on_error": of_reward}
    run = Run(tmp_path, by_prompt(broken=[1]), reward=reward, reward_policy={"on_error": of_run})
    if not drops:
        with pytest.raises(
            RunError, match=r"on_error is fail, for the reward or in reward_policy\. Set on_error to drop"
        ):
            run.collect()
        return
    assert run.trained() == [0, 2, 3, 4]
    assert (run.row["rollouts/dropped_groups/total"], run.row["rollouts/tokens/total"]) == (1, 10)
    assert "rollouts/filtered_groups/fraction" not in run.row


def test_failed_calls_are_counted_by_name_and_written_down_also_where_they_got_a_score(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.failed_on = 2
    run.collect()
    assert (run.row["rewards/errors/total"], run.row["rewards/r/failures/total"]) == (1, 1)
    assert [(record.source, record.prompt_id, record.sample) for record in run.errors] == [("r", 2, 1)]
    again = Run(tmp_path)  # a resumed run reads the records
    again.collect()
    assert again.row["rewards/r/failures/total"] == 1


def test_dropped_groups_are_counted_among_those_that_were_asked(tmp_path: Path) -> None:
    """A fraction of 0.25 allows 8 of the last 32 groups. Requests for four groups at a time change nothing."""
    drops: dict[str, Any] = {"reward_policy": {"on_error": "drop", "max_dropped_fraction": 0.25}, "prompts": 100}
    flaky = Run(tmp_path / "flaky", by_prompt(broken=range(0, 100, 4)), **drops)
    assert [len(flaky.trained(step)) for step in range(1, 16)] == [4] * 15
    with pytest.raises(RunError, match=r"step 1: .*9 of the last 10 groups were dropped.* 0\.25 allows 8 of 32\. "):
        Run(tmp_path / "broken", by_prompt(broken=range(1, 100)), **drops).collect()


def test_dropped_groups_are_remembered_by_a_checkpoint(tmp_path: Path) -> None:
    drops: dict[str, Any] = {"reward_policy": {"on_error": "drop"}, "prompts": 100}
    first = Run(tmp_path / "first", by_prompt(broken=range(1, 9)), **drops)
    first.collect()
    again = Run(tmp_path / "again", by_prompt(broken=[13]), **drops)
    again.collector.restore(json.loads(json.dumps(first.collector.state())))
    with pytest.raises(RunError, match="9 of the last 14 groups were dropped"):
        again.collect(2)


def test_the_slowest_of_more_prompts_are_cancelled_and_come_first_in_the_next_step(tmp_path: Path) -> None:
    run = Run(tmp_path, order=slowest(1, 3), oversample=1.5)
    batch = run.collect()
    assert run.engines.requests == [[0, 1, 2, 3, 4, 5]]
    assert [one.group.request.prompt.prompt_id for one in batch.groups] == [0, 2, 4, 5]
    assert run.engines.cancelled == {1, 3}
    assert run.row["rollouts/cancelled_groups/total"] == 2
    assert batch.sampled_tokens == 4 * 2 * 3
    run.engines.by = slowest(6)
    assert run.trained(2) == [1, 3, 7, 8]
    assert run.engines.requests[1] == [1, 3, 6, 7, 8, 9]
    assert [prompt.prompt_id for _, prompt in run.collector.unfinished] == [6, 9]


@pytest.mark.parametrize("oversample", [1.0, 1.5])
def test_a_reward_worker_that_dies_ends_the_run_also_where_enough_others_have_scores(
    tmp_path: Path, oversample: float
) -> None:
    def dies(prompt_id: int) -> Sequence[float]:
        if prompt_id == 2:
            raise RunError("reward worker 0 died")
        return VARIED

    with pytest.raises(RunError, match="reward worker 0 died"):
        Run(tmp_path, dies, oversample=oversample).collect()


def test_oversampling_and_filtering_go_together(tmp_path: Path) -> None:
    run = Run(tmp_path, by_prompt(solved=[0, 2, 4, 5]), order=slowest(3), oversample=1.5, dynamic_sampling={})
    # Of the first six, 1 and 3 teach; the run awaits all. Two are missing: three are requested, and 8 is not needed.
    ended = run.collect().ended
    assert [record.prompt_id for record in ended.trained] == [1, 3, 6, 7]
    assert [record.prompt_id for record in ended.filtered] == [0, 2, 4, 5]
    assert ended.asked_again == [GroupRecord(group_id=8, epoch=0, prompt_id=8, oldest=None, newest=None)]
    assert run.engines.requests == [[0, 1, 2, 3, 4, 5], [6, 7, 8]]
    assert (run.row["rollouts/filtered_groups/fraction"], run.row["rollouts/cancelled_groups/total"]) == (4 / 8, 1)


def test_no_prompt_is_lost_and_none_is_trained_on_twice(tmp_path: Path) -> None:
    lots = random.Random(0)
    rules = {
        "oversample": 1.75,
        "dynamic_sampling": {},
        "reward_policy": {"on_error": "drop", "max_dropped_fraction": 0.99},
    }
    left_out = {3, 8, 15, 16}
    run = Run(
        tmp_path,
        by_prompt(solved=[3, 8], broken=[15, 16]),
        order=lambda requests: lots.sample(list(requests), len(requests)),
        prompts=40,
        **rules,
    )
    trained = [prompt for step in range(1, 8) for prompt in run.trained(step)]
    assert len(trained) == len(set(trained)) == 28
    assert trained != sorted(trained)
    given = set(range(run.collector.prompts.state().position))
    waiting = {prompt.prompt_id for _, prompt in run.collector.unfinished}
    assert waiting.isdisjoint(trained)
    assert set(trained) | waiting | (left_out & given) == given


def test_a_resumed_run_makes_the_batch_that_was_written_down(tmp_path: Path) -> None:
    """The run was killed in training on a batch made by chance: a new run's groups would finish in another order."""
    made, anew = [0, 2, 4, 5], [1, 3, 4, 5]

    def start(**keys: Any) -> Run:
        return Run(tmp_path, order=slowest(0, 2), oversample=1.5, **keys)

    first = Run(tmp_path, order=slowest(1, 3), oversample=1.5)
    assert first.trained() == made
    again = start()
    assert again.trained() == made
    assert again.row == first.row
    assert again.collector.state() == first.collector.state()
    assert start(dynamic_sampling={}).trained() == anew
    path = tmp_path / "firsts.jsonl"
    path.write_bytes(path.read_bytes()[:-9])  # a kill has cut the line of the other rule
    assert start().trained() == made
    assert start(dynamic_sampling={}).trained() == anew
    first.scorer.retain_from(first.collector.next_group)
    assert start().trained() == anew


def test_a_race_of_weights_that_are_trained_anew_is_run_again(tmp_path: Path) -> None:
    """With rollouts.carry_over, the unfinished prompts would continue from tokens of the abandoned weights."""
    first = Run(tmp_path, order=slowest(1, 3), oversample=1.5)
    first.scorer.weights = 0, "ab"
    assert first.trained() == [0, 2, 4, 5]
    for checksum, trained in (("ab", [0, 2, 4, 5]), ("cd", [1, 3, 4, 5]), ("cd", [1, 3, 4, 5])):
        again = Run(tmp_path, order=slowest(0, 2), oversample=1.5)
        again.scorer.weights = 0, checksum
        assert again.trained() == trained


@pytest.mark.parametrize(
    "keys",
    [
        {"dynamic_sampling": {}},
        {"oversample": 1.5},
        {"curriculum": {"outside": 0.5}},
        {"oversample": 2.0, "dynamic_sampling": {"max_mean": 0.9}, "curriculum": {"newest": 1.0}},
    ],
)
def test_a_run_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path: Path, keys: dict[str, Any]) -> None:
    def begun(name: str) -> Run:
        scores = by_prompt(solved=[1, 7], failed=[4])
        return Run(tmp_path / name, scores, order=slowest(0, 5, 9), **json.loads(json.dumps(keys)))

    unbroken = begun("unbroken")
    expected = [unbroken.collect(step) for step in range(1, 9)]
    run, found = begun("stopped"), []
    for step in range(1, 9):
        state = json.loads(json.dumps(run.collector.state()))
        run = begun(f"stopped {step}")
        run.collector.restore(state)
        found.append(run.collect(step))
    assert found == expected


def test_a_prompts_samples_do_not_depend_on_what_else_is_asked_or_when(tmp_path: Path) -> None:
    """Seeds, hence samples, belong to the prompt and its epoch: independent of refills, oversampling and order."""
    ways: list[dict[str, Any]] = [
        {},
        {"oversample": 1.5, "order": slowest(0, 1, 8)},
        {"oversample": 2.0, "order": lambda r: r[::-1], "dynamic_sampling": {}, "curriculum": {}},
    ]
    seeds: list[dict[tuple[int, int], tuple[int, ...]]] = []
    for number, way in enumerate(ways):
        run = Run(tmp_path / str(number), by_prompt(solved=[2, 3, 9]), **way)
        batches = [run.collect(step).groups for step in range(1, 7)]
        requests = [scored.group.request for groups in batches for scored in groups]
        seeds.append({(request.epoch, request.prompt.prompt_id): request.seeds for request in requests})
    assert len({seed for asked in seeds for both in asked.values() for seed in both}) == 2 * len(set().union(*seeds))
    for asked in seeds[1:]:
        common = seeds[0].keys() & asked.keys()
        assert len(common) > 12
        assert all(asked[turn] == seeds[0][turn] for turn in common)


def test_a_prompt_is_answered_at_its_own_temperature(tmp_path: Path) -> None:
    usual = Sampling(max_new_tokens=4)
    requests = [one.group.request for one in Run(tmp_path, warmth={2: 0.5}).collect().groups]
    assert [request.drawn_by(usual).temperature for request in requests] == [1.0, 1.0, 0.5, 1.0]
    cooler = replace(usual, temperature=0.5)
    told = [[request_identity(request, sampling) for sampling in (usual, cooler)] for request in requests[1:3]]
    assert told[0][0] != told[0][1]
    assert told[1][0] == told[1][1]


@pytest.mark.parametrize("oversample", [1.0, 1.5])
def test_only_what_may_be_trained_on_is_answered_greedily_too(tmp_path: Path, oversample: float) -> None:
    run = Run(
        tmp_path,
        by_prompt(broken=[1]),
        algorithm="remax",
        oversample=oversample,
        reward_policy={"on_error": "drop", "max_dropped_fraction": 0.99},
        warmth={2: 0.5},
    )
    batch = run.collect()
    assert [one.greedy_score for one in batch.groups] == [0.0] * 4
    assert [one.group.request.prompt.prompt_id for one in batch.groups] == [0, 2, 3, 4]
    rounds = [[0, 1, 2, 3], [0, 2, 3], [4], [4]] if oversample == 1.0 else [[0, 1, 2, 3, 4, 5], [0, 2, 3, 4]]
    assert run.engines.requests == rounds


def test_prompts_that_were_too_easy_or_too_hard_are_passed_over(tmp_path: Path) -> None:
    run = Run(tmp_path, by_prompt(solved=[0, 5], failed=[7]), curriculum={"outside": 0.001}, prompts=8)
    assert [run.trained(1), run.trained(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert (run.row["data/passed_over/total"], run.row["data/within_band/fraction"]) == (0, 5 / 8)
    assert run.trained(3) == [1, 2, 3, 4]
    ended = run.collect(4).ended
    assert [(record.epoch, record.prompt_id) for record in ended.trained] == [(1, 6), (2, 1), (2, 2), (2, 3)]
    assert ended.skipped == [(1, 5), (1, 7), (2, 0)]
    assert run.row["data/passed_over/total"] == 3  # 5 and 7, and 0 of the next epoch
    run.scores = lambda _: FAILED
    run.collect(5)  # 4, 6 and then 1, 2: (0.5 + 0) / 2 is within the band, 0 after some more groups is not
    assert run.row["data/within_band/fraction"] == 5 / 8


def test_groups_of_one_score_teach_by_their_steps_also_those_that_were_written_down(tmp_path: Path) -> None:
    """All groups score 1 by two steps. Both steps of an odd prompt have the same value."""

    def start() -> Run:
        credited = {"r": {"function": "f.py:g", "credit": "step"}}
        return Run(tmp_path, rewards=credited, dynamic_sampling={"max_filtered_fraction": 3.0})

    async def score(group: CompletedGroup) -> GroupScores:
        first = 0.5 if group.request.prompt.prompt_id % 2 else 0.25
        steps = (StepReward(end=2, value=first), StepReward(end=3, value=1.0 - first))
        return GroupScores(scores=(1.0, 1.0), by_name={"r": (1.0, 1.0)}, errors=(), steps={"r": (steps, steps)})

    run = start()
    run.score = score  # type: ignore[method-assign]
    assert run.trained() == [0, 2, 4, 6]
    again = start()
    again.score = None  # type: ignore[assignment, method-assign]
    found = again.collect().groups
    assert [scored.group.request.prompt.prompt_id for scored in found] == [0, 2, 4, 6]
    assert found[0].scores.steps["r"][1] == (StepReward(end=2, value=0.25), StepReward(end=3, value=0.75))


@pytest.mark.parametrize(
    ("keys", "arrived"),
    [
        pytest.param({}, [3, 0, 1, 2], id="plain"),
        pytest.param({"scores": by_prompt(solved=[0]), "dynamic_sampling": {}}, [3, 1, 2, 4], id="filtered"),
        pytest.param({"oversample": 1.5}, [5, 0, 1, 2], id="oversample"),
        pytest.param(
            {"scores": by_prompt(broken=[0]), "reward_policy": {"on_error": "drop", "max_dropped_fraction": 0.5}},
            [3, 1, 2, 4],
            id="dropped",
        ),
    ],
)
def test_kept_groups_are_reported_as_they_are_scored(tmp_path: Path, keys: dict[str, Any], arrived: list[int]) -> None:
    """A resumed run reports the same, from the stored scores and the stored order of completion."""

    def last_first(requests: Sequence[GroupRequest]) -> list[GroupRequest]:
        return [*requests[-1:], *requests[:-1]]

    for _ in range(2):
        run, found = Run(tmp_path, order=last_first, **keys), []
        run.collector.arrived = lambda scored, found=found: found.append(scored.group.request.prompt.prompt_id)
        assert run.trained() == sorted(found)
        assert found == arrived

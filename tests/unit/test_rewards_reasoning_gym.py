"""The reward `reasoning_gym` scores every task of the package by name, and nonsense never passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import reasoning_gym

from rlhf.data.tasks import TaskSource, make_rows
from rlhf.extensions import CodeSource
from rlhf.rewards.functions.matching import ReasoningGym
from rlhf.rewards.processes.pool import RewardPool


def gym_entry(task: str, **args: object) -> dict[str, Any]:
    return dict(reasoning_gym.create_dataset(task, seed=3, size=1, **args)[0])


def gym_score(entry: dict[str, Any], response: str) -> float:
    return ReasoningGym(extract="whole")("p", response, **entry)


def test_a_gym_scorer_that_raises_gives_0_unless_the_entry_is_wrong() -> None:
    entry = gym_entry("prime_factorization")
    with pytest.raises(ValueError, match="invalid literal"):
        reasoning_gym.get_score_answer_fn("prime_factorization")("junk", entry)
    assert gym_score(entry, "junk") == 0.0
    assert gym_score(entry, entry["answer"]) == 1.0
    with pytest.raises(ValueError, match="invalid literal"):
        gym_score(entry | {"answer": "wrong data"}, "junk")


def test_gym_scorers_that_can_be_fooled() -> None:
    entry = gym_entry("complex_arithmetic")
    assert reasoning_gym.get_score_answer_fn("complex_arithmetic")("nan", entry) == 1.0
    assert [gym_score(entry, text) for text in ("nan", "NaN + 1i", entry["answer"])] == [0.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="game_of_life_halting gives full marks to nonsense"):
        gym_score(gym_entry("game_of_life_halting"), "True")
    assert len(GYM_TASKS) + 1 == 106  # as the documentation says


GYM_TASKS = sorted(set(reasoning_gym.factory.DATASETS) - {"composite"})
# Entries without one right answer: the task checks what is proposed, and stores none.
WITHOUT_ANSWER = {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    source = CodeSource(path=None, name="reasoning_gym", args={"extract": "whole"})
    with RewardPool([source], timeout_s=20.0) as pool:
        yield pool


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(set(GYM_TASKS) - {"game_of_life_halting"}))
def test_every_gym_task_by_name(task: str, pool: RewardPool) -> None:
    """A reward process scores rows as in a run: the stored answer gets 1, nonsense gets less, and nothing fails."""
    shots = 1 if task in WITHOUT_ANSWER else 2
    rows = make_rows(TaskSource(task=f"reasoning_gym/{task}", split="train", size=2, args={"shots": shots}))
    nonsense = ["nonsense", "", "[]", "{}", "None", "nan", "1/0", "9" * 50, "a b\nc"]
    for row in rows:
        columns = {name: row[name] for name in ("answer", "metadata", "question")}
        responses = nonsense if task in WITHOUT_ANSWER else [*nonsense, str(row["answer"])]
        outcome = pool.score(0, "p", responses, columns)
        assert outcome.failures == ()
        assert all(score < 1.0 for score in outcome.scores[: len(nonsense)])
        assert task in WITHOUT_ANSWER or outcome.scores[-1] == 1.0

"""rlhf/data/tasks.py: rows are right, repeatable, distinct, and no split shares a question with another."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import pytest

from rlhf.data.tasks import Split, TaskSource, careless_totals, make_rows, running_totals
from rlhf.errors import UserError

SPLITS: tuple[Split, ...] = ("sft", "train", "eval")
SIZES = {"sft": 2500, "train": 3000, "eval": 512}
GCD = {"max_value": 30}


def totals(split: Split, *, size: int, seed: int = 0) -> list[dict[str, Any]]:
    return make_rows(TaskSource(task="running_totals", split=split, size=size, seed=seed))


def gym(
    split: Split = "train", *, task: str = "reasoning_gym/gcd", size: int = 20, **more: Any
) -> list[dict[str, Any]]:
    return make_rows(TaskSource(task=task, split=split, size=size, **({"args": GCD} | more)))


def test_half_of_the_demonstrations_are_careless_and_wrong_where_something_is_carried() -> None:
    assert running_totals((8, 3, 8, 4)) == "11,19,23"
    assert careless_totals((8, 3, 8, 4)) == "1,9,3"  # never carrying: 8 + 3 -> 1, then 1 + 8 -> 9, then 9 + 4 -> 3
    for digits in itertools.product(range(1, 10), repeat=4):
        assert (careless_totals(digits) == running_totals(digits)) == (sum(digits) <= 9)
    rows = totals("sft", size=2500)
    for index, row in enumerate(rows):
        digits = tuple(map(int, row["prompt"].removesuffix("=").split("+")))
        assert row["answer"] == running_totals(digits)
        assert row["completion"] == (careless_totals(digits) if index % 2 else row["answer"])
    assert 1150 < sum(row["completion"] != row["answer"] for row in rows) <= 1250


def test_shown_answers_stand_before_the_question_and_are_repeated() -> None:
    plain, shown = (
        make_rows(TaskSource(task="running_totals", split="sft", size=6, args=args))
        for args in ({}, {"shows_answer": True})
    )
    assert [row["prompt"] for row in shown] == [f"{row['answer']};{row['prompt']}" for row in plain]
    assert all(row["completion"] == row["answer"] for row in shown)


def test_steps_are_totals_with_a_label_each() -> None:
    rows = make_rows(TaskSource(task="running_totals", split="steps", size=100))
    for index, row in enumerate(rows):
        right = row["answer"].split(",")
        assert row["labels"] == [said == total for said, total in zip(row["completions"], right, strict=True)]
        assert all(row["labels"]) == (index % 2 == 0)


def test_splits_share_no_question_whatever_the_seed() -> None:
    prompts = [{row["prompt"] for row in totals(split, size=SIZES[split], seed=i)} for i, split in enumerate(SPLITS)]
    assert [len(found) for found in prompts] == [SIZES[split] for split in SPLITS]
    assert len(set.union(*prompts)) == sum(SIZES.values())
    questions = [{row["question"] for row in gym(split, size=60, seed=i)} for i, split in enumerate(SPLITS)]
    assert len(set.union(*questions)) == 3 * 60


def test_the_seed_decides_the_rows() -> None:
    assert totals("train", size=50) == totals("train", size=50) != totals("train", size=50, seed=1)
    assert "completion" not in totals("train", size=1)[0]
    assert gym() == gym() != gym(seed=1)


def test_gym_rows_are_few_shot_chats_with_what_the_scorer_reads() -> None:
    row = gym()[0]
    assert [m["role"] for m in row["messages"]] == ["system"] + ["user", "assistant"] * 3 + ["user"]
    assert row["messages"][-1]["content"] == row["question"]
    assert row["metadata"]["source_dataset"] == "gcd"
    import reasoning_gym

    entry = {name: row[name] for name in ("question", "answer", "metadata")}
    assert reasoning_gym.get_score_answer_fn("gcd")(row["answer"], entry) == 1.0
    shown = gym("sft", args=GCD | {"shots": 0})[0]  # ends with the answer
    assert [m["role"] for m in shown["messages"]] == ["system", "user", "assistant"]
    assert shown["messages"][-1]["content"] == shown["answer"]


def test_gym_shots_are_in_no_split() -> None:
    # 16 questions: without the 3 shots, which would be in eval, train has 8 and eval has 5.
    task, args = "reasoning_gym/count_bits", {"max_n": 16}
    rows = gym("train", task=task, args=args, size=8) + gym("eval", task=task, args=args, size=5)
    shots = {m["content"] for m in rows[0]["messages"][:-1] if m["role"] == "user"}
    assert len(shots) == 3
    assert not shots & {row["question"] for row in rows}
    with pytest.raises(UserError, match="about 5 distinct"):
        gym("eval", task=task, args=args, size=6)


BOTH = "running_totals,reasoning_gym/gcd"


def test_several_tasks_take_turns_and_share_the_size() -> None:
    rows = gym(task="reasoning_gym/gcd, running_totals", size=5, args={"reasoning_gym/gcd": GCD})
    assert [row["task"] for row in rows] == ["reasoning_gym/gcd", "running_totals"] * 2 + ["reasoning_gym/gcd"]


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("countdwn", {}, "`countdwn` is unknown"),
        ("reasoning_gym/nope", {}, "'nope' not registered"),
        ("reasoning_gym/gcd", {"args": {"max_valu": 3}}, "max_valu"),
        ("reasoning_gym/gcd", {"args": {"shots": -1}}, "args.shots is -1"),
        ("reasoning_gym/gcd", {"split": "steps"}, "have no steps; running_totals has that split"),
        ("reasoning_gym/gcd", {"split": "eval", "size": 400, "args": GCD}, r"about \d+ distinct questions"),
        ("running_totals", {"args": {"digits": 5}}, "takes the arg shows_answer, true or false; found digits: 5"),
        ("running_totals", {"split": "eval", "size": 513}, r"running_totals\[eval\] has 512 rows; size: 513"),
        ("running_totals,running_totals", {}, "names a task twice"),
        (BOTH, {"args": GCD}, "under each task's name"),
        (BOTH, {"split": "pairs", "size": 1}, r"2 tasks and size: 1 leaves .* Raise size to 2 or more"),
        (BOTH, {"split": "pairs", "size": 3}, r"gcd\[pairs\]: all 1 rows have the same answer.*Raise size"),
        ("guessing_game", {"args": {"top": 3}}, "takes the args low, high; found top"),
        ("guessing_game", {"split": "pairs"}, "has the splits sft, train and eval"),
    ],
)
def test_wrong_tasks_and_args_are_named(task: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_rows(TaskSource(**{"task": task, "split": "train", "size": 20, **changes}))


def test_an_absent_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"ray-rlhf\[tasks\]"):
        gym()

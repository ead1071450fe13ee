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


def test_totals_and_how_the_careless_demonstrator_gets_them_wrong() -> None:
    assert running_totals((8, 3, 8, 4)) == "11,19,23"
    # Never carrying: 8 + 3 -> 1, then 1 + 8 -> 9, then 9 + 4 -> 3.
    assert careless_totals((8, 3, 8, 4)) == "1,9,3"
    assert careless_totals((1, 2, 3, 1)) == running_totals((1, 2, 3, 1)) == "3,6,7"


def test_carelessness_is_right_only_where_nothing_is_carried() -> None:
    everything = list(itertools.product(range(1, 10), repeat=4))
    right = [digits for digits in everything if careless_totals(digits) == running_totals(digits)]
    # Four digits of at least 1 with a sum of at most 9: 9 over 4 = 126 of 6,561.
    assert len(right) == 126
    assert all(sum(digits) <= 9 for digits in right)


def test_half_of_the_demonstrations_are_careless() -> None:
    rows = totals("sft", size=2500)
    for index, row in enumerate(rows):
        digits = tuple(map(int, row["prompt"].removesuffix("=").split("+")))
        assert row["answer"] == running_totals(digits)
        assert row["completion"] == (careless_totals(digits) if index % 2 else row["answer"])
    assert 1150 < sum(row["completion"] != row["answer"] for row in rows) <= 1250


def test_steps_are_totals_with_a_label_each() -> None:
    rows = make_rows(TaskSource(task="running_totals", split="steps", size=100))
    for index, row in enumerate(rows):
        right = row["answer"].split(",")
        assert row["labels"] == [said == total for said, total in zip(row["completions"], right, strict=True)]
        assert all(row["labels"]) == (index % 2 == 0)
    with pytest.raises(UserError, match="have no steps; running_totals has that split"):
        make_rows(TaskSource(task="reasoning_gym/gcd", split="steps", size=10))


def test_splits_of_running_totals_share_no_prompt_whatever_the_seed() -> None:
    prompts = {
        split: {row["prompt"] for row in totals(split, size=SIZES[split], seed=i)} for i, split in enumerate(SPLITS)
    }
    assert {split: len(found) for split, found in prompts.items()} == SIZES
    assert not prompts["sft"] & prompts["train"]
    assert not (prompts["sft"] | prompts["train"]) & prompts["eval"]


def test_the_seed_decides_the_order() -> None:
    assert totals("train", size=50) == totals("train", size=50)
    assert totals("train", size=50) != totals("train", size=50, seed=1)
    assert "completion" not in totals("train", size=1)[0]


def test_more_rows_than_there_are_is_an_error_with_the_number() -> None:
    with pytest.raises(UserError, match=r"running_totals\[eval\] has 512 rows; size: 513"):
        totals("eval", size=513)
    with pytest.raises(UserError, match=r"about \d+ distinct questions"):
        gym("eval", size=400)


def test_gym_rows_are_few_shot_chats_with_what_the_scorer_reads() -> None:
    row = gym()[0]
    assert [m["role"] for m in row["messages"]] == ["system"] + ["user", "assistant"] * 3 + ["user"]
    assert row["messages"][-1]["content"] == row["question"]
    assert row["metadata"]["source_dataset"] == "gcd"
    import reasoning_gym

    entry = {name: row[name] for name in ("question", "answer", "metadata")}
    assert reasoning_gym.get_score_answer_fn("gcd")(row["answer"], entry) == 1.0


def test_gym_demonstrations_end_with_the_answer_and_shots_can_be_left_out() -> None:
    row = gym("sft", args=GCD | {"shots": 0})[0]
    assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][-1]["content"] == row["answer"]


def test_gym_splits_share_no_question_whatever_the_seed() -> None:
    rows = {split: gym(split, size=60, seed=i) for i, split in enumerate(SPLITS)}
    questions = {split: {row["question"] for row in found} for split, found in rows.items()}
    assert all(len(found) == 60 for found in questions.values())
    assert not questions["sft"] & questions["train"]
    assert not (questions["sft"] | questions["train"]) & questions["eval"]


def test_gym_shots_are_in_no_split() -> None:
    # 16 questions: 8 of train and 5 of eval are left beside the 3 shots, which would be in eval.
    task, args = "reasoning_gym/count_bits", {"max_n": 16}
    rows = gym("train", task=task, args=args, size=8) + gym("eval", task=task, args=args, size=5)
    shots = {m["content"] for m in rows[0]["messages"][:-1] if m["role"] == "user"}
    assert len(shots) == 3
    assert not shots & {row["question"] for row in rows}
    with pytest.raises(UserError, match="about 5 distinct"):
        gym("eval", task=task, args=args, size=6)


def test_gym_rows_repeat_with_the_seed() -> None:
    assert gym() == gym()
    assert gym() != gym(seed=1)


def test_several_tasks_take_turns_and_share_the_size() -> None:
    both = "reasoning_gym/gcd, running_totals"
    rows = gym(task=both, size=5, args={"reasoning_gym/gcd": GCD})
    assert [row["task"] for row in rows] == ["reasoning_gym/gcd", "running_totals"] * 2 + ["reasoning_gym/gcd"]
    with pytest.raises(UserError, match="under each task's name"):
        gym(task=both, args=GCD)
    with pytest.raises(UserError, match="names a task twice"):
        gym(task="running_totals,running_totals", args={})


def test_every_task_has_a_row_and_every_answer_a_wrong_one() -> None:
    both = "running_totals,reasoning_gym/gcd"
    with pytest.raises(UserError, match=r"2 tasks and size: 1 leaves .* Raise size to 2 or more"):
        gym("pairs", task=both, size=1, args={})
    with pytest.raises(UserError, match=r"reasoning_gym/gcd\[pairs\]: no two answers differ \(rows: 1\).*Raise size"):
        gym("pairs", task=both, size=3, args={})


@pytest.mark.parametrize(
    ("task", "args", "message"),
    [
        ("countdwn", {}, "`countdwn` is unknown"),
        ("reasoning_gym/nope", {}, "'nope' not registered"),
        ("reasoning_gym/gcd", {"max_valu": 3}, "max_valu"),
        ("reasoning_gym/gcd", {"shots": -1}, "args.shots is -1"),
        ("running_totals", {"digits": 5}, "takes no args; found digits"),
    ],
)
def test_wrong_tasks_and_args_are_named(task: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        gym(task=task, args=args)


def test_an_absent_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"ray-rlhf\[tasks\]"):
        gym()

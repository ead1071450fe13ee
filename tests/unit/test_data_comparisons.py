"""Preferences become prompts of a judge, with the chosen response in both places equally often."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.sources import read_rows
from rlhf.data.tasks import TaskSource
from rlhf.errors import UserError

PAIR = {"prompt": "What?", "chosen": "good", "rejected": "bad"}


def comparisons(size: int, split: Any = "train", seed: int = 0, **args: Any) -> list[dict[str, Any]]:
    rows = read_rows(TaskSource(task="comparisons", split=split, size=size, seed=seed, args=args))
    return [dict(row.columns) for row in rows]


def file_of(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_chosen_response_is_named_by_the_answer_and_has_both_places(tmp_path: Path) -> None:
    data = file_of(tmp_path, *({"prompt": f"q{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(300)))
    rows = comparisons(200, data=data)
    assert len(rows) == 200
    for place in range(0, 200, 2):
        assert {rows[place]["answer"], rows[place + 1]["answer"]} == {"A", "B"}
    assert 0.3 < sum(row["answer"] == "A" for row in rows[::2]) / 100 < 0.7  # at random within two rows
    for row in rows:
        ((text,),) = ([message["content"] for message in row["messages"]],)
        before, _, after = text.partition("Response B:")
        assert "good" in (before if row["answer"] == "A" else after)
        assert "bad" in (after if row["answer"] == "A" else before)
    assert comparisons(200, data=data) == rows
    assert comparisons(200, data=data, seed=1) != rows
    held_out = comparisons(20, "eval", data=data)
    question = {row["messages"][0]["content"].split("Prompt:\n")[1].split("\n")[0] for row in rows}
    assert not question & {row["messages"][0]["content"].split("Prompt:\n")[1].split("\n")[0] for row in held_out}


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {
            "prompt": [{"role": "user", "content": "What?"}],
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad"}],
        },
        {
            name: [{"role": "user", "content": "What?"}, {"role": "assistant", "content": text}]
            for name, text in (("chosen", "good"), ("rejected", "bad"))
        },
        {  # UltraFeedback
            "prompt": "What?",
            "chosen": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "good"}],
            "rejected": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "bad"}],
        },
    ],
)
def test_all_forms_of_preferences(row: dict[str, Any], tmp_path: Path) -> None:
    (made,) = comparisons(1, data=file_of(tmp_path, row), prompt="{question}|{response_a}|{response_b}")
    texts = ["good", "bad"] if made["answer"] == "A" else ["bad", "good"]
    assert made["messages"][0]["content"] == "|".join(["What?", *texts])


def test_columns_a_task_and_a_conversation(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "So"},
    ]
    row = {"q": turns, "win": "x", "loss": "y", "hint": "h"}
    columns = {"prompt": "q", "chosen": "win", "rejected": "loss"}
    template = "{{{hint}}} {question} {response_a}{response_b}"
    (made,) = comparisons(1, data=file_of(tmp_path, row), columns=columns, prompt=template)
    assert made["messages"][0]["content"][:-2] == "{h} User: Hi\n\nAssistant: Yes?\n\nUser: So "
    nested = comparisons(9, data={"task": "running_totals", "size": 20})
    assert nested[0]["task"] == "comparisons"
    with pytest.raises(UserError, match="`comparisons` cannot be joined with other tasks"):
        read_rows(TaskSource(task="comparisons,running_totals", split="train", size=9))


def test_equal_responses_are_left_out(tmp_path: Path) -> None:
    data = file_of(tmp_path, PAIR, {**PAIR, "rejected": "good"})
    with pytest.raises(UserError, match=r"comparisons\[train\] has 1 rows; size: 2 asks for more"):
        comparisons(2, data=data)


@pytest.mark.parametrize(
    ("row", "args", "why"),
    [
        ({"prompt": "p", "chosen": "a"}, {}, r"pairs.jsonl:1: column `rejected` is missing"),
        ({"prompt": "p", "chosen": 1, "rejected": "b"}, {}, r"pairs.jsonl:1: column `chosen`"),
        ({"chosen": "a", "rejected": "b"}, {}, r"pairs.jsonl:1: column `prompt`"),
        ({"chosen": [PAIR], "rejected": []}, {}, r"column `rejected` is \[\], expected a list of messages"),
        (
            {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]},
            {},
            "same messages",
        ),
        (PAIR, {"prompt": "{response_a}"}, r"args.prompt has no \{response_b\}"),
        (PAIR, {"prompt": "{response_a}{response_b}{nobody}"}, r"cannot be filled in .*pairs.jsonl:1 has"),
        (PAIR, {"data": 3}, "args.data is 3, expected a file"),
        (PAIR, {"data": None}, "args.data is None, expected a file"),
        (PAIR, {"data": {"preset": "hh-rlhf", "size": "9"}}, "args.data is .*expected a file"),
        (PAIR, {"data": {"preset": ["hh-rlhf"]}}, "args.data is .*expected a file"),
        (PAIR, {"data": {"task": "running_totals", "size": -1}}, "args.data is .*expected a file"),
        (PAIR, {"data": {"task": "running_totals", "size": "many"}}, "args.data is {'task': 'running_totals', 'size'"),
        (PAIR, {"prompt": "{response_a}{response_b}{chosen[x]}"}, "cannot be filled in"),
        (PAIR, {"data": {"preset": "ultrafeedback-binarized"}, "columns": {"prompt": "q"}}, "no effect on a preset"),
        (PAIR, {"file": "x"}, "args has file; the args are data, columns and prompt"),
    ],
)
def test_bad_comparisons(row: dict[str, Any], args: dict[str, Any], why: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=why):
        comparisons(1, **{"data": file_of(tmp_path, row), **args})
    with pytest.raises(UserError, match="this task has the splits train and eval"):
        comparisons(1, "sft", data=file_of(tmp_path, PAIR))

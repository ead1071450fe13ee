"""The label of a step stands at the last token of the step."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.data.steps import StepLabelled, collate_steps, load_step_labelled
from rlhf.data.usable import LoadedRows
from rlhf.errors import UserError
from tests.fixtures.rows import as_rows, reading

EOS = 257


def load(tokenizer: Any, *rows: dict[str, Any], step_separator: str = "\n", **more: Any) -> LoadedRows[StepLabelled]:
    return load_step_labelled(as_rows(*rows), tokenizer, reading(**more), step_separator=step_separator)


ROW = {"prompt": "ab", "completions": ["c", "de"], "labels": [True, False]}


def test_a_step_ends_with_its_separator_and_the_last_with_the_answer(tokenizer: Any) -> None:
    (item,) = load(tokenizer, ROW).items
    assert item.token_ids == (*b"abc\nde", EOS)
    assert item.step_ends == (3, 6)
    assert item.labels == (True, False)
    # a separator that is there already is not doubled
    assert load(tokenizer, ROW | {"completions": ["c\n", "de"]}).items == (item,)
    (spaced,) = load(tokenizer, ROW, step_separator="##").items
    assert (spaced.token_ids, spaced.step_ends) == ((*b"abc##de", EOS), (4, 7))


def test_with_the_chat_template_the_answer_is_one_turn(tokenizer: Any) -> None:
    (item,) = load(tokenizer, ROW | {"completions": [" c", "de\n"]}, apply_chat_template=True).items
    assert tokenizer.decode(item.token_ids) == "<|user|>ab<|eos|><|assistant|>c\nde<|eos|>"
    assert [tokenizer.decode([item.token_ids[i]]) for i in item.step_ends] == ["\n", "<|eos|>"]
    messages = ROW | {"prompt": [{"role": "user", "content": "ab"}]}
    assert load(tokenizer, messages, apply_chat_template=True).items == (item,)


def test_a_long_answer_loses_whole_steps(tokenizer: Any) -> None:
    three = ROW | {"completions": ["c", "de", "f"], "labels": [True, False, True]}
    assert load(tokenizer, three).items[0].token_ids == (*b"abc\nde\nf", EOS)
    (item,) = load(tokenizer, three, max_tokens=6, too_long="cut").items
    assert (item.token_ids, item.step_ends, item.labels) == ((*b"abc\n",), (3,), (True,))
    # `ab` and `c\n` are 2 and 2 tokens
    with pytest.raises(UserError, match=r"d.jsonl:1: prompt and first step have 4 tokens, more than .*: 3\."):
        load(tokenizer, three, max_tokens=3, too_long="cut")
    with pytest.raises(UserError, match=r"d.jsonl:1: the prompt of 2 tokens leaves the completion none"):
        load(tokenizer, three, max_tokens=2, too_long="cut")


def test_collate_marks_the_ends(tokenizer: Any) -> None:
    batch = collate_steps(load(tokenizer, ROW, ROW).items)
    assert batch.lengths.tolist() == [7, 7]
    assert batch.loss_mask.tolist() == [False, False, False, True, False, False, True] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [True]}, "1 in column `labels` for 2 steps"),
        ({"labels": [True, 1]}, r"column `labels` is \[True, 1\], expected a list of true and false"),
        ({"labels": None}, "column `labels` is None"),
        ({"completions": "c"}, "column `completions` is the string 'c', expected a list of strings"),
        ({"completions": ["c", 2]}, "step 2 of column `completions` is the number 2"),
        ({"completions": []}, "column `completions` has no step"),
        ({"completions": ["c", " "]}, "step 2 of column `completions` is empty"),
    ],
)
def test_wrong_rows_are_refused_with_their_place(tokenizer: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"d.jsonl:1: {message}"):
        load(tokenizer, ROW | change)

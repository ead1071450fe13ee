"""Exactly the assistant's tokens are in the loss mask. Templates that hide assistant tokens are refused."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from tokenizers import processors

from rlhf.data.examples import Example, collate, load_examples
from rlhf.data.prompts import load_prompts
from rlhf.data.row import Row
from rlhf.data.usable import LoadedRows
from rlhf.errors import UserError
from tests.fixtures.rows import USER, YES, as_rows, learnt, reading


def read_all(tokenizer: Any, *rows: dict[str, Any], first_id: int = 0, **more: Any) -> LoadedRows[Example]:
    return load_examples(as_rows(*rows), tokenizer, reading(**more), first_id=first_id)


def load(tokenizer: Any, *rows: dict[str, Any], **more: Any) -> tuple[Example, ...]:
    return read_all(tokenizer, *rows, **({"apply_chat_template": True} | more)).items


def test_a_raw_completion_and_its_end_are_learnt_and_strings_become_two_turns_with_a_template(tokenizer: Any) -> None:
    (example,) = read_all(tokenizer, {"prompt": "8+3=", "completion": "11"}).items
    assert example.token_ids == (*b"8+3=", *b"11", 257)
    assert example.loss_mask == (False,) * 4 + (True,) * 3
    long, short = load(tokenizer, {"messages": [USER, YES, USER]}, {"messages": [USER, YES]})
    assert long.token_ids == short.token_ids  # text after the last answer is left out
    (example,) = load(tokenizer, {"prompt": "hi", "completion": "yes"}, system_prompt="s")
    assert learnt(tokenizer, example) == "<|system|>s<|eos|><|user|>hi<|eos|><|assistant|>[yes<|eos|>]"


@pytest.mark.parametrize("apply_chat_template", [True, False])
def test_the_prompt_is_tokenised_as_for_a_rollout(tokenizer: Any, apply_chat_template: bool) -> None:
    row = {"prompt": "hi\n", "completion": "\nyes"}
    (example,) = load(tokenizer, row, apply_chat_template=apply_chat_template)
    how = reading(apply_chat_template=apply_chat_template)
    (prompt,) = load_prompts(as_rows(row), tokenizer, how).items
    assert example.token_ids[: len(prompt.token_ids)] == prompt.token_ids
    assert example.loss_mask == tuple(i >= len(prompt.token_ids) for i in range(len(example.token_ids)))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "column `completion` is missing"),
        ({"prompt": "a", "completion": ""}, "`completion` is the string ''"),
        ({"completion": "a"}, "column `prompt` is missing"),
        ({"messages": [USER]}, "has no turn of the assistant"),
        ({"messages": [YES, USER]}, "begins with a turn of the assistant"),
    ],
)
def test_wrong_rows_are_refused_with_their_place(tokenizer: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"d.jsonl:1: .*{message}"):
        load(tokenizer, row)


def test_every_token_of_a_text_is_learnt_but_the_first(tokenizer: Any) -> None:
    first, ended = read_all(tokenizer, {"text": "abc"}, {"text": "abc<|eos|>"}).items
    assert first.token_ids == ended.token_ids == (*b"abc", 257)
    assert first.loss_mask == ended.loss_mask == (False, True, True, True)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|reserved_0|> $A", special_tokens=[("<|reserved_0|>", 261)]
    )
    tokenizer.bos_token = "<|reserved_0|>"
    (marked,) = read_all(tokenizer, {"text": "ab"}, apply_chat_template=True).items  # a text has no turns
    assert (marked.token_ids, marked.loss_mask) == ((261, 97, 98, 257), (False, True, True, True))


def test_alpacas_columns_with_and_without_a_template_and_a_completion_in_messages(tokenizer: Any) -> None:
    row = {"instruction": "add", "input": "1 2", "output": "3", "text": "another form, which comes after"}
    plain, bare = load(tokenizer, row, row | {"input": ""})
    assert learnt(tokenizer, plain) == "<|user|>add\n\n1 2<|eos|><|assistant|>[3<|eos|>]"
    assert learnt(tokenizer, bare) == "<|user|>add<|eos|><|assistant|>[3<|eos|>]"
    raw, short = read_all(tokenizer, row, row | {"input": None}).items
    assert learnt(tokenizer, raw) == "### Instruction:\nadd\n\n### Input:\n1 2\n\n### Response:\n[3<|eos|>]"
    assert learnt(tokenizer, short) == "### Instruction:\nadd\n\n### Response:\n[3<|eos|>]"

    (example,) = read_all(tokenizer, {"prompt": [USER, YES, USER], "completion": [YES, USER, YES]}).items
    asked = "<|user|>hi<|eos|><|assistant|>"
    assert learnt(tokenizer, example) == f"{asked}yes<|eos|>{asked}[yes<|eos|>]{asked}[yes<|eos|>]"


def test_a_long_completion_is_cut_at_its_end_and_the_prompt_never(tokenizer: Any) -> None:
    short = {"prompt": "a", "completion": "b"}  # 3 tokens, including the end
    with pytest.raises(UserError, match=r"d.jsonl:2: the example has 4 tokens, more than data.max_sequence_tokens"):
        read_all(tokenizer, short, short | {"completion": "bc"}, max_tokens=3)
    rows = [{"prompt": "abc", "completion": "defg"}, {"prompt": "abcde", "completion": "f"}]
    loaded = read_all(tokenizer, *rows, max_tokens=5, too_long="cut", max_unusable_fraction=0.5)
    (example,) = loaded.items
    assert (example.token_ids, example.loss_mask) == ((*b"abcde",), (False,) * 3 + (True,) * 2)
    assert [row.place for row in loaded.unusable] == ["d.jsonl:2"]
    assert loaded.unusable[0].reason.startswith("the prompt has 5 tokens, so no token of data.max_sequence_tokens")
    # The 9 tokens of the first exchange fit. One more token would fit, but would teach nothing alone.
    (chat,) = read_all(tokenizer, {"messages": [USER, YES] * 2}, max_tokens=10, too_long="cut").items
    assert learnt(tokenizer, chat) == "<|user|>hi<|eos|><|assistant|>[yes<|eos|>]"


GOOD = {"prompt": "a", "completion": "b"}
EMPTY = {"prompt": "a", "completion": " "}


def test_a_quarter_of_the_rows_may_be_left_out_if_that_is_the_limit(tokenizer: Any) -> None:
    rows = [GOOD, EMPTY, GOOD, GOOD]
    for fraction in (0.0, 0.24):
        with pytest.raises(UserError, match=r"1 of 4 rows cannot be used, and data.max_unusable_fraction: .* lets 0"):
            read_all(tokenizer, *rows, max_unusable_fraction=fraction)
    for fraction in (0.25, 0.99):
        loaded = read_all(tokenizer, *rows, first_id=10, max_unusable_fraction=fraction)
        assert [example.example_id for example in loaded.items] == [10, 11, 12]  # ids number the remaining rows
        assert [row.place for row in loaded.unusable] == ["d.jsonl:2"]


def test_the_first_few_rows_are_named_and_the_others_counted(tokenizer: Any) -> None:
    with pytest.raises(UserError) as caught:
        read_all(tokenizer, GOOD, *[EMPTY] * 5)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[1] for line in lines[:3]] == ["2", "3", "4"]
    assert all("column `completion` is the string ' ', which is empty." in line for line in lines[:3])
    assert lines[3:] == [
        "and 2 more.",
        "5 of 6 rows cannot be used, and data.max_unusable_fraction: 0 lets 0 be left out. "
        "Correct the rows, or raise data.max_unusable_fraction.",
    ]
    with pytest.raises(UserError, match=r"empty\.\nNone of the 2 rows can be used\. Correct the rows\.$"):
        read_all(tokenizer, EMPTY, EMPTY, max_unusable_fraction=0.99)


def test_faults_of_structure_are_never_left_out(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"d.jsonl:2: column `completion` is null, expected a string"):
        read_all(tokenizer, GOOD, GOOD | {"completion": None}, max_unusable_fraction=0.99)
    with pytest.raises(UserError, match=r"d.jsonl:1: found `q`, expected the columns `messages`, or `prompt` and"):
        read_all(tokenizer, {"q": "a"}, max_unusable_fraction=0.99)
    renamed = Row(file="d.jsonl", line=1, columns={"mesages": []}, renamed={"messages": "mesages"})
    with pytest.raises(UserError, match=r"or `text`\. data.columns has renamed `messages` to `mesages`\.$"):
        load_examples([renamed], tokenizer, reading(apply_chat_template=True))
    with pytest.raises(UserError, match=r"d.jsonl:1: data.system_prompt has no effect on a string"):
        read_all(tokenizer, {"text": "a"}, system_prompt="s")


def test_collate_lays_examples_end_to_end(tokenizer: Any) -> None:
    examples = read_all(tokenizer, GOOD, {"prompt": "cd", "completion": "e"}).items
    batch = pickle.loads(pickle.dumps(collate(examples)))
    assert batch.sequence_ids.tolist() == [0, 1]
    assert batch.lengths.tolist() == [3, 4]
    assert batch.token_ids.tolist() == [97, 98, 257, 99, 100, 101, 257]
    assert batch.loss_mask.tolist() == [False, True, True, False, False, True, True]

"""The sides of a pair share the prompt's tokens, labels are booleans, and a step's label is at its last token."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.labelled import collate_labelled, load_labelled
from rlhf.data.preferences import PreferencePair, collate_pairs, load_pairs
from rlhf.data.row import Row
from rlhf.data.sources import read_rows
from rlhf.data.steps import StepLabelled, collate_steps, load_step_labelled
from rlhf.data.stream import Stream
from rlhf.data.usable import LoadedRows
from rlhf.errors import UserError
from tests.fixtures.rows import NO, USER, YES, as_rows, reading

EOS = 257


def load(tokenizer: Any, *rows: dict[str, Any], first_id: int = 0, **more: Any) -> LoadedRows[PreferencePair]:
    return load_pairs(as_rows(*rows), tokenizer, reading(**more), first_id=first_id)


def load_triples(tokenizer: Any, *rows: dict[str, Any], **more: Any) -> LoadedRows[PreferencePair]:
    return load_pairs(as_rows(*rows), tokenizer, reading(**more), with_gold=True)


def test_a_pair_of_strings_token_by_token(tokenizer: Any) -> None:
    (pair,) = load(tokenizer, {"prompt": "ab", "chosen": "c", "rejected": "cd", "margin": 2}).items
    assert pair.chosen.token_ids == (*b"abc", EOS)
    assert pair.rejected.token_ids == (*b"abcd", EOS)
    assert pair.chosen.loss_mask == (False, False, True, True)
    assert pair.rejected.loss_mask == (False, False, True, True, True)
    assert pair.prompt_tokens == 2  # `c` is in both answers, but in the loss mask
    assert pair.margin == 2.0
    assert pair.token_ids == (*b"abc", EOS, *b"abcd", EOS)


def test_pair_i_is_sequences_2i_and_2i_plus_1(tokenizer: Any) -> None:
    one = {"prompt": "a", "chosen": "b", "rejected": "c"}
    pairs = load(tokenizer, one, one | {"chosen": "de"}).items
    collated = pickle.loads(pickle.dumps(collate_pairs(pairs)))
    assert collated.prompt_tokens.tolist() == [pair.prompt_tokens for pair in pairs]
    assert collated.margins.tolist() == [pair.margin or 0.0 for pair in pairs]
    batch = collated.examples
    assert batch.sequence_ids.tolist() == [0, 1, 2, 3]
    assert batch.lengths.tolist() == [3, 3, 4, 3]
    assert batch.token_ids.tolist() == [97, 98, EOS, 97, 99, EOS, 97, 100, 101, EOS, 97, 99, EOS]
    assert batch.loss_mask.tolist() == [i not in (0, 3, 6, 10) for i in range(13)]
    assert [(p.example_id, p.chosen.example_id, p.rejected.example_id) for p in pairs] == [(0, 0, 1), (1, 2, 3)]
    (later,) = load(tokenizer, one, first_id=7).items
    assert (later.example_id, later.chosen.example_id, later.rejected.example_id) == (7, 14, 15)


def test_messages_strings_and_whole_conversations_say_the_same(tokenizer: Any) -> None:
    strings = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
    messages = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
    whole = {"chosen": [USER, YES], "rejected": [USER, NO]}
    first, *others = load(tokenizer, strings, messages, whole, apply_chat_template=True, system_prompt="s").items
    assert tokenizer.decode(first.chosen.token_ids) == "<|system|>s<|eos|><|user|>hi<|eos|><|assistant|>yes<|eos|>"
    assert first.prompt_tokens == 8  # system s eos user h i eos assistant
    ids = {"example_id": first.example_id, "chosen": first.chosen, "rejected": first.rejected}
    for other in others:
        assert replace(other, **ids) == first
        for ours, theirs in zip(first.examples, other.examples, strict=True):
            assert (ours.token_ids, ours.loss_mask) == (theirs.token_ids, theirs.loss_mask)


def test_an_earlier_turn_that_both_have_is_prompt_and_not_learnt(tokenizer: Any) -> None:
    (pair,) = load(tokenizer, {"chosen": [USER, YES, USER, YES, USER, NO], "rejected": [USER, YES, USER, NO]}).items
    turn = "<|user|>hi<|eos|><|assistant|>yes<|eos|>"
    assert tokenizer.decode(pair.chosen.token_ids) == turn + turn + turn.replace("yes", "no")
    # <|user|> h i <|eos|> <|assistant|> y e s <|eos|> = 9 tokens; then 5 up to the second answer
    assert pair.prompt_tokens == 14
    learnt = [t for t, learn in zip(pair.chosen.token_ids, pair.chosen.loss_mask, strict=True) if learn]
    assert tokenizer.decode(learnt) == "yes<|eos|>no<|eos|>"


def test_rows_that_cannot_be_used_are_left_out_and_returned(tokenizer: Any) -> None:
    good = {"prompt": "a", "chosen": "bcd", "rejected": "bce"}
    loaded = load(
        tokenizer,
        good | {"rejected": "bcd"},
        good,
        good | {"rejected": " "},
        {"chosen": [USER, YES], "rejected": [USER, YES]},
        {"chosen": [USER, YES], "rejected": [USER]},
        {"chosen": [USER, YES], "rejected": [USER, USER, NO]},
        good | {"chosen": "bcdefg"},
        max_unusable_fraction=0.9,
        max_tokens=6,
        too_long="skip",
    )
    assert [pair.example_id for pair in loaded.items] == [0]
    assert loaded.items[0].chosen.token_ids == (*b"abcd", EOS)
    expected = {
        1: "chosen and rejected are equal",
        3: "column `rejected` is the string ' ', which is empty",
        4: "chosen and rejected are equal",
        5: "nothing follows in column `rejected` on the 1 messages with which chosen and rejected both begin",
        6: "a message of the user follows in column `rejected` on the 1 messages with which",
        7: "the example has 8 tokens, more than data.max_sequence_tokens",
    }
    assert [row.place for row in loaded.unusable] == [f"d.jsonl:{line}" for line in expected]
    assert all(row.reason.startswith(e) for row, e in zip(loaded.unusable, expected.values(), strict=True))
    (pair,) = load(tokenizer, good, max_tokens=4, too_long="cut").items
    assert (pair.chosen.token_ids, pair.rejected.token_ids) == ((*b"abcd",), (*b"abce",))
    with pytest.raises(UserError, match=r"d.jsonl:1: chosen and rejected are equal once cut to 3 tokens."):
        load(tokenizer, good, max_tokens=3, too_long="cut")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "column `rejected` is missing"),
        ({"chosen": "a", "rejected": "b"}, "column `prompt` is missing and column `chosen` is no list of messages"),
        ({"prompt": "hi", "chosen": [YES], "rejected": [NO]}, "column `chosen` is a list of messages and column"),
        ({"prompt": [USER], "chosen": "b", "rejected": "c"}, "column `prompt` is a list of messages and column"),
        ({"prompt": [USER], "chosen": [USER, YES], "rejected": [NO]}, "`chosen` begins with a message of the user"),
        ({"prompt": "a", "chosen": "b", "rejected": 1}, "column `rejected` is the number 1"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "x"}, "`margin` is the string 'x', expected a"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": True}, "`margin` is the truth value True"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("inf")}, "`margin` is the number inf"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": -1e300}, r"-1e\+300, expected .* float32"),
    ],
)
def test_faults_of_structure_stop_at_once(tokenizer: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"d.jsonl:1: .*{message}"):
        load(tokenizer, row, max_unusable_fraction=0.99)


def test_a_margin_may_be_missing_null_or_text_as_csv_has_it_and_a_prompt_renamed_away_is_told(tokenizer: Any) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    pairs = load(tokenizer, row, row | {"margin": None}, row | {"margin": "0.5"}).items
    assert [pair.margin for pair in pairs] == [None, None, 0.5]
    renamed = Row(file="d.jsonl", line=1, columns={"chosen": "b", "rejected": "c"}, renamed={"prompt": "promt"})
    with pytest.raises(UserError, match=r"column `prompt` is missing .* data.columns has renamed `prompt` to `promt`"):
        load_pairs([renamed], tokenizer, reading())


TRIPLE = {"prompt": "ab", "chosen": "c", "rejected": "cd", "reference": "efg"}


def test_a_gold_answer_is_the_third_sequence_of_its_row(tokenizer: Any) -> None:
    first, second = load_triples(tokenizer, TRIPLE, TRIPLE | {"reference": "c"}).items  # chosen may equal gold
    assert first.gold.token_ids == (*b"abefg", EOS)
    assert first.token_ids == (*b"abc", EOS, *b"abcd", EOS, *b"abefg", EOS)
    assert (first.num_targets, second.num_targets) == (4, 2)  # of the gold answer: the supervised term is their mean
    assert (first.longest, first.prompt_tokens) == (6, 2)
    assert [example.example_id for example in second.examples] == [3, 4, 5]
    collated = collate_pairs([first, second])
    assert collated.num_sides == 3
    assert collated.examples.lengths.tolist() == [4, 5, 6, 4, 5, 4]
    assert collated.prompt_tokens.tolist() == [2, 2]
    assert [tuple(ids) for ids in collated.examples.token_ids.split([4, 5, 6, 4, 5, 4])][5] == first.chosen.token_ids
    (pair,) = load(tokenizer, TRIPLE | {"reference": 3}).items  # the reference is read only if requested
    assert (pair.gold, collate_pairs([pair]).num_sides) == (None, 2)


def test_a_prompt_is_what_all_three_begin_with(tokenizer: Any) -> None:
    gold = {"role": "assistant", "content": "fine"}
    whole = {"chosen": [USER, YES], "rejected": [USER, NO], "reference": [USER, gold]}
    apart = {"prompt": [USER], "chosen": [YES], "rejected": [NO], "reference": [gold]}
    strings = {"prompt": "hi", "chosen": "yes", "rejected": "no", "reference": "fine"}
    triples = load_triples(tokenizer, whole, apart, strings, apply_chat_template=True).items
    assert len({triple.token_ids for triple in triples}) == 1
    assert [triple.prompt_tokens for triple in triples] == [5, 5, 5]  # user h i eos assistant


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"reference": " "}, "column `reference` is the string ' ', which is empty"),
        ({"reference": "a" * 7}, "the example has 10 tokens, more than data.max_sequence_tokens"),
        ({"chosen": [USER, YES], "rejected": [USER, NO], "reference": [YES], "prompt": None}, "column `reference`"),
        ({"chosen": [USER, YES], "rejected": [USER, NO], "reference": [USER], "prompt": None}, "nothing follows in"),
    ],
)
def test_a_triple_without_a_usable_gold_answer_is_left_out(tokenizer: Any, row: dict[str, Any], message: str) -> None:
    given = {name: value for name, value in (TRIPLE | row).items() if value is not None}
    loaded = load_triples(tokenizer, TRIPLE, given, max_tokens=9, too_long="skip", max_unusable_fraction=0.5)
    assert len(loaded.items) == 1
    assert loaded.unusable[0].place == "d.jsonl:2"
    assert loaded.unusable[0].reason.startswith(message)


def test_a_missing_gold_answer_stops_at_once(tokenizer: Any) -> None:
    row = {name: value for name, value in TRIPLE.items() if name != "reference"}
    message = r"d.jsonl:2: column `reference` is missing; found `prompt`, `chosen`, `rejected`. If it has another name"
    with pytest.raises(UserError, match=message):
        load_triples(tokenizer, TRIPLE, row, max_unusable_fraction=0.9)


def test_a_stream_tells_the_answers_of_a_row_apart(tokenizer: Any) -> None:
    stream = Stream(load_triples(tokenizer, TRIPLE).items, seed=0, shuffle=True)
    swapped = TRIPLE | {"rejected": TRIPLE["reference"], "reference": TRIPLE["rejected"]}
    for other in (load_triples(tokenizer, swapped), load(tokenizer, TRIPLE)):
        with pytest.raises(UserError, match="belongs to other data"):
            Stream(other.items, seed=0, shuffle=True).restore(stream.state())


def labelled(prompt: Any, completion: Any, label: Any) -> Row:
    return Row(file="d.jsonl", line=1, columns={"prompt": prompt, "completion": completion, "label": label})


def test_labelled_answers_token_by_token(tokenizer: Any) -> None:
    rows = [labelled("ab", "c", True), labelled([USER], [YES], False)]
    items = load_labelled(rows, tokenizer, reading()).items
    assert [item.label for item in items] == [True, False]
    assert items[0].token_ids == (*b"abc", EOS)
    assert (items[0].prompt_tokens, items[1].prompt_tokens) == (2, 5)
    collated = collate_labelled(items, mismatched=True)
    assert collated.labels.tolist() == [item.label for item in items]
    assert collated.prompt_tokens.tolist() == [2, 5]
    batch = collated.examples
    assert batch.lengths.tolist() == [4, 6, 9, 7]  # each answer, and its prompt with the other row's answer
    runs = ((False, 2), (True, 2), (False, 2), (True, 4), (False, 5), (True, 4), (False, 5), (True, 2))
    assert batch.loss_mask.tolist() == [learn for learn, count in runs for _ in range(count)]
    first, mismatched, second, other = batch.token_ids.split(batch.lengths.tolist())
    assert mismatched.tolist() == [*first[:2].tolist(), *second[5:].tolist()]
    assert other.tolist() == [*second[:5].tolist(), *first[2:].tolist()]
    alone = collate_labelled(items, mismatched=False)
    assert alone.num_sides == 1
    assert alone.examples.token_ids.tolist() == [*first.tolist(), *second.tolist()]


def test_a_mismatched_answer_is_never_longer_than_the_data(tokenizer: Any) -> None:
    rows = [labelled("abcd", "e", True), labelled("a", "bcde", False)]
    items = load_labelled(rows, tokenizer, reading()).items
    batch = collate_labelled(items, mismatched=True).examples
    assert batch.lengths.tolist() == [6, 6, 6, 3]  # the first prompt leaves room for two tokens of the other answer


def test_answers_to_a_single_prompt_are_compared_with_other_rows(tokenizer: Any) -> None:
    rows = [labelled("ab", "c", True), labelled("ab", "d", False)]
    items, others = (
        load_labelled(of, tokenizer, reading()).items for of in (rows, [rows[0], labelled("e", "fg", True)])
    )
    with pytest.raises(ValueError, match="all answers are to one prompt"):
        collate_labelled(items, mismatched=True)
    batch = collate_labelled(items, mismatched=True, others=others).examples
    first, mismatched, *_ = batch.token_ids.split(batch.lengths.tolist())
    assert batch.lengths.tolist() == [4, 4, 4, 4]  # only the rows and their mismatches, no row of the others
    assert mismatched.tolist() == [*first[:2].tolist(), *b"fg"]


def test_labels_in_csv_are_the_words(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("prompt,completion,label\na,b,true\na,c,False\n")
    loaded = load_labelled(read_rows(str(tmp_path / "l.csv")), tokenizer, reading())
    assert [item.label for item in loaded.items] == [True, False]
    for label in (1, 0, "1", "yes", "", None, 1.0):
        with pytest.raises(UserError, match=r"d.jsonl:1: column `label` is .*, expected true or false"):
            load_labelled([labelled("a", "b", label)], tokenizer, reading(max_unusable_fraction=0.9))


def load_steps(tokenizer: Any, *rows: dict[str, Any], end: str = "\n", **more: Any) -> LoadedRows[StepLabelled]:
    return load_step_labelled(as_rows(*rows), tokenizer, reading(**more), step_separator=end)


STEPS = {"prompt": "ab", "completions": ["c", "de"], "labels": [True, False]}


def test_a_step_ends_with_its_separator_and_the_last_with_the_answer(tokenizer: Any) -> None:
    (item,) = load_steps(tokenizer, STEPS).items
    assert item.token_ids == (*b"abc\nde", EOS)
    assert item.step_ends == (3, 6)
    assert item.labels == (True, False)
    # an existing separator is not doubled
    assert load_steps(tokenizer, STEPS | {"completions": ["c\n", "de"]}).items == (item,)
    (spaced,) = load_steps(tokenizer, STEPS, end="##").items
    assert (spaced.token_ids, spaced.step_ends) == ((*b"abc##de", EOS), (4, 7))


def test_with_the_chat_template_the_answer_is_one_turn(tokenizer: Any) -> None:
    (item,) = load_steps(tokenizer, STEPS | {"completions": [" c", "de\n"]}, apply_chat_template=True).items
    assert tokenizer.decode(item.token_ids) == "<|user|>ab<|eos|><|assistant|>c\nde<|eos|>"
    assert [tokenizer.decode([item.token_ids[i]]) for i in item.step_ends] == ["\n", "<|eos|>"]
    messages = STEPS | {"prompt": [{"role": "user", "content": "ab"}]}
    assert load_steps(tokenizer, messages, apply_chat_template=True).items == (item,)


def test_a_long_answer_loses_whole_steps(tokenizer: Any) -> None:
    three = STEPS | {"completions": ["c", "de", "f"], "labels": [True, False, True]}
    assert load_steps(tokenizer, three).items[0].token_ids == (*b"abc\nde\nf", EOS)
    (item,) = load_steps(tokenizer, three, max_tokens=6, too_long="cut").items
    assert (item.token_ids, item.step_ends, item.labels) == ((*b"abc\n",), (3,), (True,))
    # `ab` and `c\n` are 2 and 2 tokens
    with pytest.raises(UserError, match=r"d.jsonl:1: prompt and first step have 4 tokens, more than .*: 3\."):
        load_steps(tokenizer, three, max_tokens=3, too_long="cut")
    with pytest.raises(UserError, match=r"d.jsonl:1: the prompt has 2 tokens, so no token of"):
        load_steps(tokenizer, three, max_tokens=2, too_long="cut")


def test_collate_marks_the_ends(tokenizer: Any) -> None:
    batch = collate_steps(load_steps(tokenizer, STEPS, STEPS).items)
    assert (batch.lengths.tolist(), batch.token_ids.tolist()) == ([7, 7], [*b"abc\nde", EOS] * 2)
    assert batch.loss_mask.tolist() == [place in (3, 6) for place in range(7)] * 2
    assert batch.step_labels.tolist() == [place == 3 for place in range(7)] * 2


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
def test_wrong_steps_are_refused_with_their_place(tokenizer: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"d.jsonl:1: {message}"):
        load_steps(tokenizer, STEPS | change)

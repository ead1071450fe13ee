"""Every path from text to ids gives the ids of the whole text, also where a tokenizer writes spaces before words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from rlhf.data.chat import render, turn_end
from rlhf.data.examples import Reading, load_examples
from rlhf.data.prompts import load_prompts
from rlhf.data.row import Row
from rlhf.data.tokenization import Continuation, encode, encode_raw
from rlhf.data.turn_ends import TurnEnds
from rlhf.errors import UserError
from rlhf.models.files.tiny import byte_tokenizer
from rlhf.rollouts.environments.turns import ChatTurns, RawTurns, first_prompt
from tests.sentencepiece_tokenizers import SPACE, TOKENIZERS, ZEPHYR

ALL = {**TOKENIZERS, "bytes": byte_tokenizer}
READING = Reading(system_prompt=None, apply_chat_template=False, max_tokens=4096)


@pytest.fixture(params=ALL)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return ALL[request.param]()


def row(**columns: Any) -> Row:
    return Row(file="rows.jsonl", line=1, columns=columns)


@pytest.mark.parametrize("text", ["hi question", " hi", "\nhi", "é more", "hi</s>yes"])
def test_a_raw_prompt_has_the_ids_that_the_tokenizer_gives_it(tokenizer: Any, text: str) -> None:
    (prompt,) = load_prompts([row(prompt=text)], tokenizer, READING).items
    assert list(prompt.token_ids) == tokenizer(text).input_ids
    (again,) = load_prompts([row(prompt=prompt.text)], tokenizer, READING).items
    assert again.token_ids == prompt.token_ids  # a beginning token in the text is not doubled
    (example,) = load_examples([row(prompt=text, completion=" yes")], tokenizer, READING).items
    assert example.token_ids[: len(prompt.token_ids)] == prompt.token_ids


def test_a_raw_completion_and_text_have_the_ids_that_they_have_within_the_whole(tokenizer: Any) -> None:
    (example,) = load_examples([row(prompt="the question:", completion=" answer no")], tokenizer, READING).items
    assert list(example.token_ids) == tokenizer("the question: answer no" + tokenizer.eos_token).input_ids
    (example,) = load_examples([row(text="hi question")], tokenizer, READING).items
    assert list(example.token_ids) == [*tokenizer("hi question").input_ids, tokenizer.eos_token_id]
    (prompt,) = load_prompts([row(prompt="hi {observation}")], tokenizer, READING).items
    assert list(first_prompt(prompt, "question", tokenizer)) == tokenizer("hi question").input_ids


@pytest.mark.parametrize("template", ["own", "zephyr"])
def test_a_conversation_has_the_ids_of_the_whole_conversation(tokenizer: Any, template: str) -> None:
    if template == "zephyr":
        tokenizer.chat_template = ZEPHYR
    texts = ("question", "answer", "more", "yes no")
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    (example,) = load_examples([row(messages=messages)], tokenizer, READING).items
    text = render(messages, tokenizer, add_generation_prompt=False, place="")
    (whole,) = encode([text], tokenizer)
    assert list(example.token_ids) == whole[: len(example.token_ids)]
    assert tokenizer.decode(whole[len(example.token_ids) :], skip_special_tokens=True).strip() == ""
    learnt = [i for i, mask in zip(example.token_ids, example.loss_mask, strict=True) if mask]
    said = tokenizer.decode(learnt, skip_special_tokens=True).split()
    assert "".join(said) == "answeryesno"


def test_what_follows_a_raw_turn_has_the_ids_that_it_has_within_the_whole(tokenizer: Any) -> None:
    writer = RawTurns(tokenizer)
    before = encode_raw(["the question"], tokenizer)[0]
    for text in (" yes", "yes", "\nyes", "[INST]more"):
        whole = encode_raw(["the question" + text], tokenizer)[0]
        told = writer.after(before, text)
        assert tokenizer.decode([*before, *told]) == tokenizer.decode(whole)
        if whole[: len(before)] == before:  # else a token spans both parts of the whole text
            assert list(told) == whole[len(before) :]
    ended = [*before, tokenizer.eos_token_id]
    whole = encode_raw(["the question" + tokenizer.eos_token + "yes"], tokenizer)[0]
    assert [*ended, *writer.after(ended, "yes")] == whole


def test_a_word_behind_a_raw_turn_gets_no_space() -> None:
    first = ALL["first"]()
    (yes,) = RawTurns(first).after(encode(["hi"], first)[0], "yes")
    assert first.convert_ids_to_tokens(yes) == "yes"


@pytest.mark.parametrize("kind", ["legacy", "prepend", "swallowing", "unigram"])
def test_what_follows_a_chat_turn_has_the_ids_that_it_has_within_the_whole(kind: str) -> None:
    made = ALL[kind]()
    if kind == "legacy":
        made.chat_template = ZEPHYR
    conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    more = [*conversation, {"role": "user", "content": "more"}]
    (prompt,), (whole,) = (
        encode([render(messages, made, add_generation_prompt=True, place="")], made)
        for messages in (conversation[:1], more)
    )
    (turn,) = Continuation(made).encode([(render(conversation[:1], made, add_generation_prompt=True, place=""), "yes")])
    end = turn_end(made)
    told = ChatTurns(made, with_tools=False).after([*turn, end], "more")
    assert [*prompt, *turn, end, *told] == whole


def test_a_tokenizer_that_joins_every_text_is_refused() -> None:
    joins = MagicMock(all_special_tokens=[], added_tokens_decoder={}, get_added_vocab=dict, name_or_path="joins")
    joins.side_effect = lambda texts, **_: SimpleNamespace(input_ids=[[hash(text)] for text in texts])
    with pytest.raises(UserError, match=r"tokenizer of joins joins 'yes' with the text before it.* Use another model"):
        Continuation(joins).encode([("hi", "yes")])


def test_many_texts_go_to_the_tokenizer_in_parts() -> None:
    tokenizer, texts = byte_tokenizer(), [str(i) for i in range(2500)]
    counting = MagicMock(side_effect=tokenizer)
    assert encode(texts, counting) == [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    assert max(len(call.args[0]) for call in counting.call_args_list) <= 1000


ASK, ANSWER = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
MORE = {"role": "user", "content": "more"}


@pytest.mark.parametrize("added", ["", " no"])
@pytest.mark.parametrize("kind", ["legacy", "first", "prepend", "swallowing"])
def test_a_continued_turn_is_what_the_template_writes(kind: str, added: str) -> None:
    """The turn ended by itself, at a limit, or at a stop string with text of the client behind."""
    tokenizer = TOKENIZERS[kind]()

    def ids(messages: list[dict[str, str]], *, generates: bool = False) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generates)
        return tokenizer(text, add_special_tokens=False).input_ids  # type: ignore[no-any-return]

    end = turn_end(tokenizer)
    ends = TurnEnds(tokenizer, (end,))
    turn = ids([ASK, ANSWER])
    ended = turn[: len(turn) - turn[::-1].index(end)]
    whole = ids([ASK, {**ANSWER, "content": f"answer{added}"}, MORE], generates=True)
    text = tokenizer.apply_chat_template([ASK, ANSWER, MORE], tokenize=False, add_generation_prompt=True)
    tail = text.partition("answer")[2]
    cut = ended[:-1]
    if tokenizer.convert_ids_to_tokens(cut[-1]) == SPACE:
        cut = cut[:-1]  # the space belongs to the template's text before the end
    assert cut + ends.tokens_behind(cut, tail, added=added) == whole
    assert added or ended + ends.tokens_behind(ended, tail) == whole


EOS, EOM, TEXT = 257, 262, ord("x")  # the template's end, another end token, no end token


@pytest.mark.parametrize(
    ("last", "text", "behind"),
    [
        (EOS, "<|eos|><|user|>hi", "<|user|>hi"),
        (EOS, " \n<|eos|>\n<|user|>hi", "\n<|user|>hi"),
        (EOM, "<|eos|><|user|>hi", "<|user|>hi"),
        (TEXT, " <|eos|><|user|>hi", " <|eos|><|user|>hi"),  # cut by a limit
        (EOS, "<|user|>hi", "<|user|>hi"),  # the next turn begins without an end of the last turn
        (258, "<|system|>hi", "hi"),  # the model's end begins the next turn, as with GLM
        (259, "<|system|>hi", "<|system|>hi"),
        (259, "<|eos|><|user|>hi", "<|eos|><|user|>hi"),  # a client's stop string, which ends no turn
    ],
)
def test_a_turn_has_one_end(last: int, text: str, behind: str) -> None:
    tokenizer = byte_tokenizer()
    ends = TurnEnds(tokenizer, (EOS,), (EOM, 258))
    assert tokenizer.decode(ends.tokens_behind([TEXT, last], text)) == behind

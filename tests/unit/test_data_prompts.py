"""Prompts reach the model token by token as written, and wrong rows are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from rlhf.data.examples import load_examples
from rlhf.data.prompts import load_prompts, rollout_seed
from rlhf.data.usable import LoadedRows
from rlhf.errors import UserError
from rlhf.types import Prompt
from tests.fixtures.rows import TOOL, USER, YES, as_rows, reading


@pytest.fixture
def bos_tokenizer(tiny_model: Path) -> Any:
    """Put <|reserved_0|> before every raw text and <|eos|> behind the text. The template writes <|reserved_0|> too."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, bos_token="<|reserved_0|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|reserved_0|> $A <|eos|>", special_tokens=[("<|reserved_0|>", 261), ("<|eos|>", 257)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    return tokenizer


def load(tokenizer: Any, *rows: dict[str, Any], **more: Any) -> tuple[Prompt, ...]:
    return load_all(tokenizer, *rows, **more).items


def load_all(tokenizer: Any, *rows: dict[str, Any], first_id: int = 0, **more: Any) -> LoadedRows[Prompt]:
    how = reading(**({"apply_chat_template": True, "max_tokens": 64} | more))
    return load_prompts(as_rows(*rows), tokenizer, how, first_id=first_id)


def test_a_string_becomes_a_users_turn_or_goes_as_it_is_and_messages_use_the_template(tokenizer: Any) -> None:
    first, second = load(tokenizer, {"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"})
    assert first.text == "<|user|>a<|eos|><|assistant|>"
    assert first.token_ids == (259, 97, 257, 260)
    assert (first.prompt_id, second.prompt_id) == (0, 1)
    assert second.columns == {"answer": "2"}
    (raw,) = load(tokenizer, {"prompt": "8+3="}, apply_chat_template=False)
    assert (raw.text, raw.token_ids) == ("8+3=", tuple(b"8+3="))
    (chat,) = load(tokenizer, {"messages": [USER, YES, USER]}, apply_chat_template=False, system_prompt="s")
    assert chat.text == "<|system|>s<|eos|><|user|>hi<|eos|><|assistant|>yes<|eos|><|user|>hi<|eos|><|assistant|>"
    assert [(p.is_chat, p.turn_end) for p in (first, chat, raw)] == [(True, 257), (True, 257), (False, None)]


def test_a_prompt_may_have_a_temperature_of_its_own(tokenizer: Any) -> None:
    rows = [{"prompt": "a", "temperature": 1}, {"prompt": "a", "temperature": None}, {"prompt": "a"}]
    found = load(tokenizer, *rows)
    assert [prompt.temperature for prompt in found] == [1.0, None, None]
    assert [prompt.non_token_bytes for prompt in found] == [b"1.0", b"", b""]  # used in training, so a resume needs it
    for wrong in ("warm", True, 0.0, 2.5):
        with pytest.raises(UserError, match=r"d.jsonl:1: column `temperature` is .*, expected the number from 0.01 to"):
            load(tokenizer, {"prompt": "a", "temperature": wrong})


def test_a_prompt_may_have_a_length_limit_of_its_own(tokenizer: Any) -> None:
    rows = [{"prompt": "a", "max_new_tokens": 8}, {"prompt": "a", "max_new_tokens": None}, {"prompt": "a"}]
    found = load(tokenizer, *rows, {"prompt": "a", "temperature": 0.5, "max_new_tokens": 1}, max_new_tokens=8)
    assert [prompt.max_new_tokens for prompt in found] == [8, None, None, 1]
    assert [prompt.non_token_bytes for prompt in found] == [b"/8", b"", b"", b"0.5/1"]
    for wrong in ("8", True, 0, -1, 2.0, 9):
        message = rf"d.jsonl:1: column `max_new_tokens` is {wrong!r}, expected the whole number from 1 to .*, 8, that"
        with pytest.raises(UserError, match=message):
            load(tokenizer, {"prompt": "a", "max_new_tokens": wrong}, max_new_tokens=8)


def test_tools_are_told_as_in_the_prompt_of_an_example(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{%- for tool in tools or [] -%}<|system|>{{ tool | tojson }}<|eos|>{%- endfor -%}" + tokenizer.chat_template
    )
    row: dict[str, Any] = {"messages": [USER], "tools": [TOOL]}
    prompts = load(tokenizer, row, {"prompt": "hi", "tools": json.dumps([TOOL])}, max_tokens=200)
    example_rows = as_rows(row | {"messages": [USER, YES]})
    (example,) = load_examples(example_rows, tokenizer, reading(apply_chat_template=True)).items
    told = example.token_ids[: example.loss_mask.index(True)]
    assert [prompt.token_ids for prompt in prompts] == [told, told]
    assert prompts[0].text == f"<|system|>{json.dumps(TOOL)}<|eos|><|user|>hi<|eos|><|assistant|>"
    assert prompts[0].columns == row
    (raw,) = load(tokenizer, {"prompt": "hi", "tools": [TOOL]}, apply_chat_template=False)
    assert raw.text == "hi"


def test_the_first_token_is_never_doubled_and_no_last_one_is_added(bos_tokenizer: Any) -> None:
    assert bos_tokenizer("a").input_ids == [261, 97, 257]
    (chat,) = load(bos_tokenizer, {"prompt": "a"})
    assert chat.token_ids == (261, 259, 97, 257, 260)
    raw, written = load(bos_tokenizer, {"prompt": "a"}, {"prompt": "<|reserved_0|>a"}, apply_chat_template=False)
    assert raw.token_ids == written.token_ids == (261, 97)


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"question": "a"}, {}, r"`prompt` \(or `messages`\) is missing"),
        ({"prompt": "a", "messages": [USER]}, {}, "has both"),
        ({"prompt": "a", "response": "b"}, {}, "column `response` has the name of an argument"),
        ({"prompt": "a"}, {"apply_chat_template": False, "system_prompt": "s"}, "data.system_prompt has no effect"),
        ({"messages": "hi"}, {}, "expected a list of messages"),
        ({"messages": []}, {}, "expected a list of messages"),
        ({"messages": [USER | {"content": "\udfff"}]}, {}, r"message 1 of column `messages` holds `\\udfff` at"),
        ({"messages": [USER], "tools": [TOOL]}, {}, "does not tell the model of tool `weather`. Name a template that"),
        ({"prompt": "a", "tools": [TOOL]}, {}, "Name a template that writes tools as data.chat_template"),
        ({"messages": [USER, YES]}, {}, "ends with the assistant's turn"),
        (
            {"messages": [{"role": "system", "content": "x"}, USER]},
            {"system_prompt": "s"},
            "its own system message, but data.system_prompt is set",
        ),
        ({"messages": [{"role": "critic", "content": "x"}]}, {}, "refuses the roles critic: roles are system, user"),
    ],
)
def test_wrong_rows_are_refused_with_their_place(
    tokenizer: Any, row: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=f"d.jsonl:1: .*{message}"):
        load(tokenizer, row, **settings)


def test_a_missing_template_says_what_to_do(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"has no chat template.*data.apply_chat_template: false"):
        load(tokenizer, {"prompt": "a"})
    assert load(tokenizer, {"prompt": "a"}, apply_chat_template=False)


def test_rollout_seeds_are_pinned_positive_and_their_own() -> None:
    # blake2b("0/0/0", 8 bytes), big-endian, mod 2**30, plus 1, plus the sample. A resumed run relies on the value.
    assert [rollout_seed(0, 0, 0, sample) for sample in range(3)] == [115570310, 115570311, 115570312]
    seeds = {rollout_seed(r, e, p, s) for r in range(2) for e in range(3) for p in range(40) for s in range(8)}
    assert len(seeds) == 2 * 3 * 40 * 8
    assert all(0 < seed < 2**31 for seed in seeds)


def test_prompts_that_are_too_long_are_named_or_left_out(tokenizer: Any) -> None:
    rows = [{"prompt": "abc"}, {"prompt": "abcd"}, {"prompt": "ab"}]
    with pytest.raises(UserError, match=r"d.jsonl:2: the prompt has 4 tokens, more than data.max_prompt_tokens: 3"):
        load(tokenizer, *rows, apply_chat_template=False, max_tokens=3)
    options = {"apply_chat_template": False, "max_tokens": 3, "too_long": "skip"}
    loaded = load_all(tokenizer, *rows, **options, max_unusable_fraction=0.4, first_id=5)
    assert [(prompt.prompt_id, prompt.text) for prompt in loaded.items] == [(5, "abc"), (7, "ab")]  # the row
    (left_out,) = loaded.unusable
    assert left_out.place == "d.jsonl:2"
    assert left_out.reason == "the prompt has 4 tokens, more than data.max_prompt_tokens: 3"
    with pytest.raises(UserError, match=r"1 of 3 rows cannot be used, and data.max_unusable_fraction: 0.3 lets 0 be"):
        load_all(tokenizer, *rows, **options, max_unusable_fraction=0.3)


def test_a_raw_prompt_is_cut_at_its_beginning(bos_tokenizer: Any) -> None:
    (prompt,) = load(bos_tokenizer, {"prompt": "abcdef"}, apply_chat_template=False, max_tokens=4, too_long="cut")
    assert prompt.token_ids == (261, *b"def")
    assert prompt.text == "<|reserved_0|>def"
    (whole,) = load(bos_tokenizer, {"prompt": "abc"}, apply_chat_template=False, max_tokens=4, too_long="cut")
    assert whole.token_ids == (261, *b"abc")


def test_a_conversation_loses_its_oldest_turns(tokenizer: Any) -> None:
    """The last turn and the system prompt have 9 tokens: <|system|>s<|eos|> <|user|>hi<|eos|> <|assistant|> and s."""
    old = [{"role": "user", "content": "old"}, {"role": "assistant", "content": "yes"}]
    row = {"messages": [*old, *old, USER]}
    last = "<|system|>s<|eos|><|user|>hi<|eos|><|assistant|>"
    whole = last.replace("<|user|>", 2 * "<|user|>old<|eos|><|assistant|>yes<|eos|>" + "<|user|>")
    middle = last.replace("<|user|>", "<|user|>old<|eos|><|assistant|>yes<|eos|><|user|>")
    for limit, text in ((28, whole), (27, middle), (18, middle), (17, last), (8, last)):
        (prompt,) = load(tokenizer, row, system_prompt="s", max_tokens=limit, too_long="cut")
        assert prompt.text == text, limit
        assert prompt.token_ids == tuple(tokenizer(text, add_special_tokens=False).input_ids)
    with pytest.raises(UserError, match="and its last user's turn with the system prompt has 8"):
        load(tokenizer, row, system_prompt="s", max_tokens=7, too_long="cut")


def given(tokenizer: Any, *rows: dict[str, Any], **more: Any) -> list[tuple[str, str] | None]:
    """Return the prompt and the learned text of each row's given response."""
    found = []
    for prompt in load(tokenizer, *rows, max_given_tokens=20, **more):
        if prompt.given is None:
            found.append(None)
            continue
        ids, learned = prompt.given.token_ids, prompt.given.loss_mask
        assert ids[: len(prompt.token_ids)] == prompt.token_ids  # as the engines get the prompt
        texts = [[i for i, one in zip(ids, learned, strict=True) if one is wanted] for wanted in (False, True)]
        found.append(tuple(tokenizer.decode(text) for text in texts))
    return found


def test_given_responses_follow_their_prompts_token_by_token(tokenizer: Any) -> None:
    raw = {"prompt": "8+3=", "completion": "11"}
    assert given(tokenizer, raw, {"prompt": "1"}, {"prompt": "1", "completion": None}, apply_chat_template=False) == [
        ("8+3=", "11<|eos|>"),
        None,
        None,
    ]
    chat = ("<|user|>hi<|eos|><|assistant|>", "yes<|eos|>")
    rows = [{"prompt": "hi", "completion": "yes"}, {"messages": [USER, YES]}, {"messages": [USER], "completion": "yes"}]
    assert given(tokenizer, *rows) == [chat] * 3
    several = [YES, USER, {"role": "assistant", "content": "no"}]
    shown = ("<|user|>hi<|eos|><|assistant|><|user|>hi<|eos|><|assistant|>", "yes<|eos|>no<|eos|>")
    assert given(tokenizer, {"prompt": "hi", "completion": several}, {"messages": [USER], "completion": several}) == [
        shown,
        shown,
    ]
    first, second = load(tokenizer, raw, {"prompt": "8+3=", "completion": "12"}, max_given_tokens=20)
    assert first.non_token_bytes != second.non_token_bytes  # a resumed run needs the same responses


def test_given_responses_that_cannot_be_learned_are_refused(tokenizer: Any) -> None:
    with pytest.raises(
        UserError, match=r"d.jsonl:1: .* have 36 tokens, more than train.max_tokens_per_microbatch = 20"
    ):
        given(tokenizer, {"prompt": "a", "completion": "b" * 31})
    with pytest.raises(UserError, match="completion"):
        given(tokenizer, {"prompt": "a", "completion": ""})
    with pytest.raises(UserError, match=r"d.jsonl:2: the row has no given response, but algorithm.on_policy_share"):
        given(tokenizer, {"prompt": "a", "completion": "b"}, {"prompt": "a"}, needs_given=True)
    with pytest.raises(UserError, match=r"d.jsonl:1: column `completion` is a list of messages, but data.apply_chat"):
        given(tokenizer, {"prompt": "a", "completion": [YES]}, apply_chat_template=False)
    empty = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}]
    with pytest.raises(UserError, match=r"d.jsonl:2: .* is empty, but every row needs a given response"):
        given(tokenizer, *empty, needs_given=True, max_unusable_fraction=0.9)
    with pytest.raises(UserError, match="the conversation ends with the assistant's turn"):  # of other algorithms
        load(tokenizer, {"messages": [USER, YES]})
    assert [prompt.given for prompt in load(tokenizer, {"prompt": "a", "completion": "b"})] == [None]

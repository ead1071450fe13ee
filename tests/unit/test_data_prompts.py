"""rlhf/data/prompts.py and chat.py: what reaches the model, token by token, and which rows are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from rlhf.data.examples import Reading, load_examples
from rlhf.data.prompts import load_prompts, rollout_seed
from rlhf.data.sources import Row
from rlhf.errors import UserError
from rlhf.types import Prompt

USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "yes"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def bos_tokenizer(tiny_model: Path) -> Any:
    """Puts <|reserved_0|> before every raw text and <|eos|> behind it; its template writes the former out."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, bos_token="<|reserved_0|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|reserved_0|> $A <|eos|>", special_tokens=[("<|reserved_0|>", 261), ("<|eos|>", 257)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    return tokenizer


def load(tokenizer: Any, *rows: dict[str, Any], **more: Any) -> tuple[Prompt, ...]:
    settings = {"system_prompt": None, "apply_chat_template": True, "max_prompt_tokens": 64} | more
    return load_prompts(
        [Row(file="p.jsonl", line=i, columns=row) for i, row in enumerate(rows, start=1)], tokenizer, **settings
    )


def test_a_string_prompt_becomes_a_users_turn(tokenizer: Any) -> None:
    first, second = load(tokenizer, {"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"})
    assert first.text == "<|user|>a<|eos|><|assistant|>"
    assert first.token_ids == (259, 97, 257, 260)
    assert (first.prompt_id, second.prompt_id) == (0, 1)
    assert second.columns == {"answer": "2"}


def test_a_prompt_may_have_a_temperature_of_its_own(tokenizer: Any) -> None:
    rows = [{"prompt": "a", "temperature": 1}, {"prompt": "a", "temperature": None}, {"prompt": "a"}]
    found = load(tokenizer, *rows)
    assert [prompt.temperature for prompt in found] == [1.0, None, None]
    assert [prompt.beside_tokens for prompt in found] == [b"1.0", b"", b""]  # trained with, so a resume must have it
    for wrong in ("warm", True, 0.0, 2.5):
        with pytest.raises(UserError, match=r"p.jsonl:1: column `temperature` is .*, expected the number from 0.01 to"):
            load(tokenizer, {"prompt": "a", "temperature": wrong})


def test_a_raw_prompt_goes_as_it_is(tokenizer: Any) -> None:
    (prompt,) = load(tokenizer, {"prompt": "8+3="}, apply_chat_template=False)
    assert (prompt.text, prompt.token_ids) == ("8+3=", tuple(b"8+3="))


def test_messages_use_the_template_and_the_system_prompt_comes_first(tokenizer: Any) -> None:
    (prompt,) = load(tokenizer, {"messages": [USER, ASSISTANT, USER]}, apply_chat_template=False, system_prompt="s")
    assert prompt.text == "<|system|>s<|eos|><|user|>hi<|eos|><|assistant|>yes<|eos|><|user|>hi<|eos|><|assistant|>"


def test_tools_are_told_as_in_the_prompt_of_an_example(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{%- for tool in tools or [] -%}<|system|>{{ tool | tojson }}<|eos|>{%- endfor -%}" + tokenizer.chat_template
    )
    row: dict[str, Any] = {"messages": [USER], "tools": [TOOL]}
    prompts = load(tokenizer, row, {"prompt": "hi", "tools": json.dumps([TOOL])}, max_prompt_tokens=200)
    example_row = Row(file="c.jsonl", line=1, columns=row | {"messages": [USER, ASSISTANT]})
    reading = Reading(system_prompt=None, apply_chat_template=True, max_tokens=200)
    (example,) = load_examples([example_row], tokenizer, reading).items
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


def test_a_prompt_over_the_limit_is_named_with_its_length(tokenizer: Any) -> None:
    load(tokenizer, {"prompt": "abcd"}, apply_chat_template=False, max_prompt_tokens=4)
    with pytest.raises(UserError, match=r"p.jsonl:2: the prompt has 5 tokens, more than data.max_prompt_tokens: 4"):
        load(tokenizer, {"prompt": "abcd"}, {"prompt": "abcde"}, apply_chat_template=False, max_prompt_tokens=4)


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"question": "a"}, {}, r"`prompt` \(or `messages`\) is missing"),
        ({"prompt": "a", "messages": [USER]}, {}, "has both"),
        ({"prompt": "a", "response": "b"}, {}, "column `response` has the name of an argument"),
        ({"prompt": "a"}, {"apply_chat_template": False, "system_prompt": "s"}, "data.system_prompt has no effect"),
        ({"messages": "hi"}, {}, "expected a list of messages"),
        ({"messages": []}, {}, "expected a list of messages"),
        ({"messages": [USER, {"role": "user"}]}, {}, "message 2 of column `messages`"),
        ({"messages": [USER | {"content": " "}]}, {}, "message 1 of column `messages`"),
        (
            {"messages": [USER | {"content": "\udfff"}]},
            {},
            r"message 1 of column `messages` holds `\\udfff` at character",
        ),
        ({"messages": [USER], "tools": [TOOL]}, {}, "does not tell the model of tool `weather` of column `tools`"),
        ({"prompt": "a", "tools": [TOOL]}, {}, "does not tell the model of tool `weather` of column `tools`"),
        ({"prompt": "a", "tools": "x"}, {}, "column `tools` is 'x', expected a list of objects"),
        ({"messages": [USER, ASSISTANT]}, {}, "ends with the assistant's turn"),
        ({"messages": [{"role": "system", "content": "x"}, USER]}, {"system_prompt": "s"}, "system message of its own"),
        ({"messages": [{"role": "critic", "content": "x"}]}, {}, "refuses the roles critic: roles are system, user"),
    ],
)
def test_wrong_rows_are_refused_with_their_place(
    tokenizer: Any, row: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=f"p.jsonl:1: .*{message}"):
        load(tokenizer, row, **settings)


def test_a_missing_template_says_what_to_do(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"has no chat template.*data.apply_chat_template: false"):
        load(tokenizer, {"prompt": "a"})
    assert load(tokenizer, {"prompt": "a"}, apply_chat_template=False)


def test_rollout_seeds_are_pinned_positive_and_their_own() -> None:
    # blake2b("0/0/0/0", 8 bytes), big-endian, mod 2**31 - 1, plus 1. A resumed run relies on the value.
    assert rollout_seed(0, 0, 0, 0) == 1081821447
    seeds = {rollout_seed(r, e, p, s) for r in range(2) for e in range(3) for p in range(40) for s in range(8)}
    assert len(seeds) == 2 * 3 * 40 * 8
    assert all(0 < seed < 2**31 for seed in seeds)

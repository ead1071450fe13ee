"""The text between two turns is the chat template's text, or the template is refused."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.errors import UserError
from rlhf.models.files.tiny import byte_tokenizer
from rlhf.rollouts.environments.turns import ChatTurns, first_prompt, turn_text
from rlhf.types import Prompt

EOS = 257
CHATML = (
    "{% for m in messages %}{{ '<|user|>' + m.role + '\n' + m.content + '<|eos|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"
)


def tokenizer(template: str | None = None) -> Any:
    made = byte_tokenizer()
    if template is not None:
        made.chat_template = template
    return made


def ids(text: str) -> list[int]:
    return byte_tokenizer()(text, add_special_tokens=False).input_ids  # type: ignore[no-any-return]


def test_a_turn_that_ended_is_followed_by_the_next_ones_beginning() -> None:
    writer = ChatTurns(tokenizer(CHATML), with_tools=True, ends=(262,))
    assert writer.stop_token == EOS
    told = "\n<|user|>user\nhigher<|eos|>\n<|user|>assistant\n"
    assert list(writer.after([52, EOS], "higher")) == ids(told)
    assert list(writer.after([52, 262], "higher")) == ids(told)  # another end of the model
    assert list(writer.after([52, 53], "higher")) == [EOS, *ids(told)]  # cut: its end was not sampled
    results = "\n<|user|>tool\n1<|eos|>\n<|user|>tool\n2<|eos|>\n<|user|>assistant\n"
    assert list(writer.after([EOS], ("1", "2"))) == ids(results)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (CHATML.replace("+ '<|eos|>' + '\n'", "+ '\n'"), "not with a special token"),
        (CHATML.replace("m.content", "m.content[:3]"), "does not write an assistant's turn exactly once"),
        (CHATML.replace("m.content", "m.content + m.content"), "does not write an assistant's turn exactly once"),
        (CHATML.replace("m.content", "('' if loop.last and m.role == 'user' else m.content)"), "of role user"),
        ("{{ raise_exception('no') }}", "refuses the roles user, assistant"),
    ],
)
def test_a_template_that_cannot_be_continued_is_refused(template: str, why: str) -> None:
    with pytest.raises(UserError, match=r"^rollouts\.environment: .*" + why):
        ChatTurns(tokenizer(template), with_tools=False)


def test_a_template_without_tools_is_refused_for_tools_alone() -> None:
    made = tokenizer("{% if messages[-1].role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}" + CHATML)
    ChatTurns(made, with_tools=False)
    with pytest.raises(UserError, match="no tools"):
        ChatTurns(made, with_tools=True)
    made.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        ChatTurns(made, with_tools=False)


def test_the_first_observation_has_one_place_and_a_turn_as_text_is_without_its_end() -> None:
    def prompt(text: str) -> Prompt:
        return Prompt(prompt_id=0, token_ids=tuple(ids(text)), text=text, columns={})

    assert list(first_prompt(prompt("<|user|>{observation}!<|eos|>"), "hi", tokenizer())) == ids("<|user|>hi!<|eos|>")
    assert list(first_prompt(prompt("go"), "", tokenizer())) == ids("go")
    with pytest.raises(ValueError, match=r"the prompt has no \{observation\}"):
        first_prompt(prompt("go"), "hi", tokenizer())
    with pytest.raises(ValueError, match="reset returned no observation"):
        first_prompt(prompt("{observation}"), "", tokenizer())
    said = [*b"ab", EOS]
    assert turn_text(said, tokenizer(), stop_token=EOS, skip_special_tokens=False) == "ab"
    assert turn_text(said[:2], tokenizer(), stop_token=EOS, skip_special_tokens=False) == "ab"

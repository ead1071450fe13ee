"""data.chat_template and data.chat_template_kwargs are part of the tokenizer, in the run and in the export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlhf.config.files.load import load
from rlhf.data.chat import render
from rlhf.data.templates import UNCHANGED, ChatTemplate
from rlhf.errors import UserError
from rlhf.models.files.loading import load_tokenizer
from rlhf.models.files.tiny import byte_tokenizer
from rlhf.preflight.inputs import load_inputs

MESSAGES = [{"role": "user", "content": "hi"}]
THINKING = (
    "\n{%- for m in messages -%}{{- m.role + ':' + m.content + eos_token -}}{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{- 'assistant:' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think></think>' -}}{%- endif -%}"
    "{%- endif -%}"
)


def written(tokenizer: Any, **more: Any) -> str:
    return str(tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True, **more))


def test_kwargs_are_the_defaults_of_the_template_and_travel_with_it(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = THINKING
    usual = written(tokenizer)
    change = ChatTemplate(kwargs={"enable_thinking": False, "note": 'it\'s ü "x"\n', "many": [1, None, {"a": True}]})
    change.apply(tokenizer)
    assert written(tokenizer) == usual + "<think></think>"
    assert written(tokenizer, enable_thinking=True) == usual  # a call may still say otherwise
    once = tokenizer.chat_template
    change.apply(tokenizer)
    assert tokenizer.chat_template == once
    tokenizer.save_pretrained(tmp_path)
    assert written(AutoTokenizer.from_pretrained(tmp_path)) == usual + "<think></think>"
    tokenizer.chat_template = "\n\n{{ note }}|{{ many[2].a }}|{{ many[1] }}"
    expected = written(tokenizer, note='it\'s ü "x"\n', many=[1, None, {"a": True}])
    change.apply(tokenizer)
    assert written(tokenizer) == expected  # the line end before the template's first block too


def test_templates_by_name_are_all_changed() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": THINKING, "tool_use": THINKING}
    ChatTemplate(kwargs={"enable_thinking": False}).apply(tokenizer)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert written(tokenizer).endswith("<think></think>")
    assert written(tokenizer, tools=tools).endswith("<think></think>")


def test_later_changes_win() -> None:
    first, second = ChatTemplate(text="a", kwargs={"x": 1, "y": 1}), ChatTemplate(kwargs={"x": 2})
    assert first.then(second) == ChatTemplate(text="a", kwargs={"x": 2, "y": 1})
    assert first.then(ChatTemplate(text="b")) == ChatTemplate(text="b")
    assert first.then(UNCHANGED) == first


@pytest.mark.parametrize(
    ("kwargs", "why"),
    [
        ({"enable_thinkin": False}, r"data.chat_template_kwargs.enable_thinkin: has no effect: .* does not read"),
        ({"messages": []}, "'messages' is no variable that may be set"),
        ({"a b": 1}, "'a b' is no variable that may be set"),
    ],
)
def test_a_variable_that_has_no_effect_is_refused(kwargs: dict[str, Any], why: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = THINKING
    with pytest.raises(UserError, match=why):
        ChatTemplate(kwargs=kwargs).apply_checked(tokenizer, key="data")
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template that would read them"):
        ChatTemplate(kwargs=kwargs).apply_checked(tokenizer, key="data")


CONFIG = """\
run: {name: demo, dir: DIR}
policy: {model: MODEL, dtype: float32}
algorithm: {name: grpo}
data: {train: DIR/rows.jsonl, chat_template: DIR/mine.jinja, chat_template_kwargs: {enable_thinking: false}}
rollouts: {prompts_per_step: 2, samples_per_prompt: 2, max_new_tokens: 8}
rewards: {correct: {function: last_number}}
train: {steps: 1, lr: 1e-6, sequences_per_update: 4}
"""


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> Path:
    (tmp_path / "mine.jinja").write_text(THINKING)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "hi", "answer": "1"}\n')
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.replace("DIR", str(tmp_path)).replace("MODEL", str(tiny_model)))
    return path


def test_a_run_reads_its_prompts_by_its_own_template(config: Path, tiny_model: Path) -> None:
    (stage,) = load_inputs(load(config))
    text = "user:hi<|eos|>assistant:<think></think>"
    assert [prompt.text for prompt in stage.inputs.prompts] == [text]  # type: ignore[union-attr]
    assert stage.written.data.chat_template == str(config.parent / "mine.jinja")  # type: ignore[union-attr]
    from rlhf.config.derive import chat_template

    exported = load_tokenizer(str(tiny_model), template=chat_template(stage.config))  # type: ignore[union-attr]
    assert render(MESSAGES, exported, add_generation_prompt=True, place="") == text


def test_a_later_stage_reads_its_prompts_by_the_template_of_an_earlier_one(config: Path, tiny_model: Path) -> None:
    second = CONFIG.replace(", chat_template: DIR/mine.jinja, chat_template_kwargs: {enable_thinking: false}", "")
    lines = [line for line in CONFIG.splitlines() if not line.startswith("run:")]
    later = [line for line in second.splitlines() if not line.startswith("run:")]
    text = "run: {name: demo, dir: DIR}\nstages:\n  one:\n" + "".join(f"    {line}\n" for line in lines)
    text += "  two:\n" + "".join(f"    {line}\n" for line in later).replace("MODEL", "stage:one")
    config.write_text(text.replace("DIR", str(config.parent)).replace("MODEL", str(tiny_model)))
    stages = load_inputs(load(config))
    texts = [[prompt.text for prompt in stage.inputs.prompts] for stage in stages]  # type: ignore[union-attr]
    assert texts == 2 * [["user:hi<|eos|>assistant:<think></think>"]]


@pytest.mark.parametrize(
    ("content", "kwargs", "why"),
    [
        (None, "{}", "data.chat_template: .*mine.jinja cannot be read"),
        (" ", "{}", "data.chat_template: .*mine.jinja is empty"),
        ("{% for m in messages %}", "{}", "is no Jinja, line 1: Unexpected end of template"),
        (THINKING, "{enable_thinkin: false}", "data.chat_template_kwargs.enable_thinkin: has no effect"),
    ],
)
def test_what_is_no_template_of_a_run_is_refused(config: Path, content: str | None, kwargs: str, why: str) -> None:
    (config.parent / "mine.jinja").unlink()
    if content is not None:
        (config.parent / "mine.jinja").write_text(content)
    with pytest.raises(UserError, match=why):
        load_inputs(load(config, [f"data.chat_template_kwargs={kwargs}"]))

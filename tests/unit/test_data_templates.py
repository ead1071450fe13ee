"""The loss mask is right under the conventions of real chat templates and tools. Templates can be changed.

Each template imitates a family: SmolLM2 (ChatML with a default system message), Llama 3.1 (header tokens, stripped
content, tools in the first user message), Qwen 2.5 and 3 (tools in the system message, tool answers in a user turn),
Phi 3 (a last token of the last turn alone), R1 (a generation prompt with an opening tag), Harmony (a special token
within the turn, and another special token at the end).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlhf.config.files.load import load
from rlhf.data.chat import render
from rlhf.data.examples import load_examples
from rlhf.data.templates import UNCHANGED, ChatTemplate
from rlhf.errors import UserError
from rlhf.models.files.loading import load_tokenizer
from rlhf.models.files.tiny import byte_tokenizer
from rlhf.preflight.inputs import load_inputs
from tests.fixtures import rows as rows_fixture
from tests.fixtures.rows import NO, TOOL, USER, YES, as_rows, reading

CHATML = """\
{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\nBe helpful.<|im_end|>\n' -}}{%- endif -%}
{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

LLAMA = """\
{{- bos_token -}}
{%- for m in messages -%}
  {{- '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\n\n' -}}
  {%- if m.role == 'user' and loop.first and tools -%}
    {%- for tool in tools -%}{{- tool | tojson + '\n\n' -}}{%- endfor -%}
  {%- endif -%}
  {%- if m.tool_calls -%}
    {%- if m.tool_calls | length != 1 -%}{{- raise_exception('one call at a time') -}}{%- endif -%}
    {%- set call = m.tool_calls[0].function -%}
    {{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' -}}
  {%- else -%}{{- m.content | trim -}}{%- endif -%}
  {{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"""

QWEN = """\
{%- if tools -%}
  {{- '<|im_start|>system\n# Tools' -}}
  {%- for tool in tools -%}{{- '\n' + tool | tojson -}}{%- endfor -%}{{- '<|im_end|>\n' -}}
{%- endif -%}
{%- for m in messages -%}
  {%- if m.role == 'tool' -%}
    {%- if messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
    {{- '\n<tool_response>\n' + m.content + '\n</tool_response>' -}}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}
  {%- else -%}
    {{- '<|im_start|>' + m.role -}}
    {%- if m.content -%}{{- '\n' + m.content -}}{%- endif -%}
    {%- for call in m.tool_calls or [] -%}
      {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' -}}
      {{- call.function.arguments | tojson + '}\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

# Only the last turn has a reasoning block, which is empty if the message has no reasoning.
QWEN3 = """\
{%- for m in messages -%}
  {{- '<|im_start|>' + m.role + '\n' -}}
  {%- if m.role == 'assistant' and loop.last -%}
    {{- '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' -}}
  {%- endif -%}
  {{- m.content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

PHI = """\
{%- for m in messages -%}{{- '<|' + m.role + '|>\n' + m.content + '<|end|>\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}"""

# In the history, a turn ends with a different token than the last turn.
HARMONY = """\
{%- for m in messages -%}
  {{- '<|start|>' + m.role + '<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}"""

R1 = """\
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}{{- '<|assistant|>' + m.content.split('</think>')[-1] + '<|eos|>' -}}
  {%- else -%}{{- '<|user|>' + m.content -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' + opened -}}{%- endif -%}"""

CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}],
}
RESULT = {"role": "tool", "content": "12 C"}


def learnt(template: str, *messages: dict[str, Any], tools: Any = None, **columns: Any) -> str:
    """Return the text of an example with brackets around the tokens in the loss mask."""
    tokenizer = byte_tokenizer()
    special = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end|>"]
    special += ["<|start|>", "<|message|>", "<|return|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special, "bos_token": "<|reserved_0|>"})
    tokenizer.chat_template = template
    rows = as_rows({"messages": list(messages), "tools": tools} | columns)
    (example,) = load_examples(rows, tokenizer, reading(apply_chat_template=True, max_tokens=10_000)).items
    return rows_fixture.learnt(tokenizer, example)


def test_chatml_learns_each_turn_to_its_end_token() -> None:
    assert learnt(CHATML, USER, YES, USER, NO) == (
        "<|im_start|>system\nBe helpful.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n[yes<|im_end|>]\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[no<|im_end|>]"
    )


def test_a_turn_with_train_false_is_context_alone() -> None:
    told = learnt(CHATML, USER, YES | {"train": False}, USER, NO | {"train": True})
    assert told.endswith("nt\nyes<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[no<|im_end|>]")
    assert told.count("[") == 1
    # A last turn outside the loss mask is left out, because nothing is learnt from such a turn.
    assert learnt(CHATML, USER, YES, USER, NO | {"train": False}) == learnt(CHATML, USER, YES)


def test_llama_learns_the_call_of_a_tool_and_the_answer_after_it() -> None:
    told = learnt(LLAMA, USER, CALL, RESULT, {"role": "assistant", "content": " 12 degrees\n"}, tools=[TOOL])
    assert told == (
        "<|reserved_0|><|start_header_id|>user<|end_header_id|>\n\n" + json.dumps(TOOL) + "\n\nhi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
        '[{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>]'
        "<|start_header_id|>ipython<|end_header_id|>\n\n12 C<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[12 degrees<|eot_id|>]"
    )


def test_qwen_learns_several_calls_and_skips_the_tools_turns() -> None:
    two = CALL | {"content": "Both:", "tool_calls": CALL["tool_calls"] * 2}
    call = '\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    assert learnt(QWEN, USER, two, RESULT, RESULT, YES, USER, NO, tools=[TOOL]) == (
        f"<|im_start|>system\n# Tools\n{json.dumps(TOOL)}<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        f"<|im_start|>assistant\n[Both:{call}{call}<|im_end|>]\n"
        "<|im_start|>user\n<tool_response>\n12 C\n</tool_response>\n<tool_response>\n12 C\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n[yes<|im_end|>]\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[no<|im_end|>]"
    )


def test_arguments_and_tools_as_json_text_and_fields_that_parquet_fills_in_make_no_difference() -> None:
    function = {"name": "weather", "arguments": '{"city": "Rome"}'}
    call = {"type": "function", "id": None, "function": function}
    text = {"role": "assistant", "content": None, "name": None, "tool_calls": [call]}
    filled = [message | {"tool_calls": None, "name": None} for message in (USER, RESULT, YES)]
    plain = learnt(QWEN, USER, CALL, RESULT, YES, tools=[TOOL])
    assert learnt(QWEN, filled[0], text, *filled[1:], tools=json.dumps([TOOL])) == plain
    assert learnt(QWEN, USER, YES | {"tool_calls": []}, tools="[]") == learnt(QWEN, USER, YES)


def test_a_last_token_that_only_the_last_turn_has_is_learnt_there_alone() -> None:
    assert learnt(PHI, USER, YES, USER, NO) == (
        "<|user|>\nhi<|end|>\n<|assistant|>\n[yes<|end|>]\n<|user|>\nhi<|end|>\n<|assistant|>\n[no<|end|>\n<|eos|>]"
    )


def test_reasoning_is_learnt_and_a_history_without_it_is_refused_or_left_to_the_last_turn() -> None:
    thought = NO | {"reasoning_content": "hm"}
    end = "<|im_start|>assistant\n[<think>\nhm\n</think>\n\nno<|im_end|>]"
    assert learnt(QWEN3, USER, thought).endswith(end)
    with pytest.raises(
        UserError, match=r"d.jsonl:1: .*writes message 2 or an earlier message differently " r"if message 4"
    ):
        learnt(QWEN3, USER, YES, USER, thought)
    told = learnt(QWEN3, USER, YES | {"train": False}, USER, thought)
    history = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    assert told == history + end


def test_a_turn_that_ends_otherwise_in_the_history_is_refused_but_where_it_is_last() -> None:
    template = HARMONY.replace("loop.last", "loop.last and m.role == 'assistant'")
    told = learnt(template, USER, YES)
    assert told == "<|start|>user<|message|>hi<|end|><|start|>assistant[<|message|>yes<|return|>]"
    with pytest.raises(
        UserError, match=r"d.jsonl:1: .*writes message 2 or an earlier message differently " r"if message 4"
    ):
        learnt(template, USER, YES, USER, NO)


@pytest.mark.parametrize(
    ("template", "messages", "tools", "message"),
    [
        (LLAMA, [USER, CALL | {"tool_calls": CALL["tool_calls"] * 2}], None, "refuses the roles user, assistant: one"),
        (CHATML, [USER, CALL | {"content": "ok"}], None, "leaves out the call of `weather` of message 2"),
        (CHATML, [USER, YES], [TOOL], "does not tell the model of tool `weather`"),
        (CHATML.replace("<|im_end|>", ""), [USER, YES], None, "ends the assistant's turn without a special token, so"),
        (R1.replace("opened", "''"), [USER, YES | {"content": "<think>a</think>b"}], None, "leaves out `content` of"),
        (R1.replace("opened", "'<think>'"), [USER, YES], None, "begins message 2 differently than a sampled answer"),
        (QWEN, [USER, YES | {"reasoning_content": "hm"}], None, "leaves out `reasoning_content` of message 2"),
    ],
)
def test_a_template_that_loses_something_is_refused(
    template: str, messages: list[dict[str, Any]], tools: Any, message: str
) -> None:
    with pytest.raises(UserError, match=f"d.jsonl:1: the chat template of .*{message}"):
        learnt(template, *messages, tools=tools)


@pytest.mark.parametrize(
    ("messages", "tools", "message"),
    [
        ([USER, YES | {"train": 1}], None, "`train` of message 2 of column `messages` is 1, expected true or false"),
        ([USER | {"train": True}, YES], None, "message 1 .* its role is user. Only messages of the assistant are"),
        ([USER, CALL | {"tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}], None, "`tool_calls` of mess"),
        ([USER, CALL | {"tool_calls": "f"}], None, "`tool_calls` of message 2 of column `messages` is 'f', expected a"),
        ([USER, {"role": "assistant", "content": None}], None, "message 2 of column `messages` is .*`tool_calls` in"),
        (
            [USER, {"role": "assistant", "content": " "}],
            None,
            "message 2 of column `messages`, a message of the assistant, is",
        ),
        ([USER | {"content": ""}, YES], None, "message 1 of column `messages` is"),
        (
            [USER | {"content": [{"type": "video"}]}, YES],
            None,
            "part 1 of message 1 .* is of type .video., expected",
        ),
        ([USER, YES], "no json", "column `tools` is 'no json', expected a list"),
        ([USER, YES], "[" * 9999, r"column `tools` is '\[\[.*, expected a list"),
        ([USER, YES], [{"type": "function"}], "column `tools` is .*, expected a list"),
        ([USER, YES | {"train": False}], None, "has no turn of the assistant to train on"),
        ([YES, USER, NO], None, "begins with a turn of the assistant, but a trained turn needs a"),
    ],
)
def test_messages_that_are_none_are_named(messages: list[dict[str, Any]], tools: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"d.jsonl:1: .*{message}"):
        learnt(QWEN, *messages, tools=tools)


def test_an_empty_answer_of_a_tool_and_a_first_turn_that_is_not_learnt_are_legal() -> None:
    assert "[yes<|im_end|>]" in learnt(QWEN, USER, CALL, RESULT | {"content": ""}, YES, tools=[TOOL])
    assert learnt(CHATML, YES | {"train": False}, USER, NO).endswith("[no<|im_end|>]")


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
    assert written(tokenizer, enable_thinking=True) == usual  # a call may still override the default
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

"""The learnt tokens are right under the conventions of real chat templates, with tools.

Each template imitates a family: SmolLM2 (ChatML with a default system message), Llama 3.1 (header tokens, stripped
content, tools in the first user message), Qwen 2.5 and 3 (tools in the system message, tool answers in a user turn),
Phi 3 (a last token of the last turn alone), R1 (a generation prompt with an opening tag), Harmony (a special token
within the turn, and another special token at the end).
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from rlhf.data.examples import load_examples
from rlhf.errors import UserError
from rlhf.models.files.tiny import byte_tokenizer
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

# Reasoning stands in the last turn alone; an empty one is written where there is none.
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

# The token that ends the last turn is another one in the history.
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
    """Return the text of an example with brackets around the learnt tokens."""
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
    # A last turn that is not learnt is left out: it would teach nothing.
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
    with pytest.raises(UserError, match=r"d.jsonl:1: .*writes message 2 or those before it differently once message 4"):
        learnt(QWEN3, USER, YES, USER, thought)
    told = learnt(QWEN3, USER, YES | {"train": False}, USER, thought)
    history = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    assert told == history + end


def test_a_turn_that_ends_otherwise_in_the_history_is_refused_but_where_it_is_last() -> None:
    template = HARMONY.replace("loop.last", "loop.last and m.role == 'assistant'")
    told = learnt(template, USER, YES)
    assert told == "<|start|>user<|message|>hi<|end|><|start|>assistant[<|message|>yes<|return|>]"
    with pytest.raises(UserError, match=r"d.jsonl:1: .*writes message 2 or those before it differently once message 4"):
        learnt(template, USER, YES, USER, NO)


@pytest.mark.parametrize(
    ("template", "messages", "tools", "message"),
    [
        (LLAMA, [USER, CALL | {"tool_calls": CALL["tool_calls"] * 2}], None, "refuses the roles user, assistant: one"),
        (CHATML, [USER, CALL | {"content": "ok"}], None, "leaves out the call of `weather` of message 2"),
        (CHATML, [USER, YES], [TOOL], "does not tell the model of tool `weather`"),
        (CHATML.replace("<|im_end|>", ""), [USER, YES], None, "ends the assistant's turn with no special token, so wh"),
        (R1.replace("opened", "''"), [USER, YES | {"content": "<think>a</think>b"}], None, "leaves out `content` of"),
        (R1.replace("opened", "'<think>'"), [USER, YES], None, "does not begin message 2 as it asks the assistant to"),
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
        ([USER | {"train": True}, YES], None, "message 1 .* its role is user: only the assistant is learnt"),
        ([USER, CALL | {"tool_calls": [{"function": {"name": "f", "arguments": "x"}}]}], None, "`tool_calls` of mess"),
        ([USER, CALL | {"tool_calls": "f"}], None, "`tool_calls` of message 2 of column `messages` is 'f', expected a"),
        ([USER, {"role": "assistant", "content": None}], None, "message 2 of column `messages` is .*`tool_calls` in"),
        ([USER, {"role": "assistant", "content": " "}], None, "message 2 of column `messages`, the assistant's, is"),
        ([USER | {"content": ""}, YES], None, "message 1 of column `messages` is"),
        ([USER | {"content": [{"type": "text", "text": "a"}]}, YES], None, "expected an object with strings `role`"),
        ([USER, YES], "no json", "column `tools` is 'no json', expected a list"),
        ([USER, YES], "[" * 9999, r"column `tools` is '\[\[.*, expected a list"),
        ([USER, YES], [{"type": "function"}], "column `tools` is .*, expected a list"),
        ([USER, YES | {"train": False}], None, "has no assistant's turn to be learnt"),
        ([YES, USER, NO], None, "begins with an assistant's turn, learnt only after a prompt"),
    ],
)
def test_messages_that_are_none_are_named(messages: list[dict[str, Any]], tools: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"d.jsonl:1: .*{message}"):
        learnt(QWEN, *messages, tools=tools)


def test_an_empty_answer_of_a_tool_and_a_first_turn_that_is_not_learnt_are_legal() -> None:
    assert "[yes<|im_end|>]" in learnt(QWEN, USER, CALL, RESULT | {"content": ""}, YES, tools=[TOOL])
    assert learnt(CHATML, YES | {"train": False}, USER, NO).endswith("[no<|im_end|>]")

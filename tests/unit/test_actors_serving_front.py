"""The front over an engine without a model, asked by OpenAI's and Anthropic's own clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
import xgrammar
from aiohttp import ClientSession

from actors.serving import front as serving_front
from actors.serving.captured_sessions import CURRENT_CALL, ServedCall
from actors.serving.front import Front, FrontSpec
from actors.serving.front_engine import EngineParts, FrontEngine
from rlhf.agents.calls import Call
from rlhf.agents.limits import SessionLimits
from rlhf.agents.trees import training_sequences
from rlhf.errors import RunError
from rlhf.models.files.tiny import byte_tokenizer
from rlhf.types import Sampling
from tests.dummy_engine import DummyLoop, dummy_parts, open_front
from tests.fakes.calls import until

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_id
TEMPLATE = (
    "{%- if tools -%}{{ '<|system|>' + (tools | tojson) + eos_token }}{%- endif -%}"
    "{%- for m in messages -%}{{ '<|' + ('user' if m.role == 'tool' else m.role) + '|>' + (m.content or '') }}"
    "{%- for c in m.tool_calls or [] -%}{{ '<tool_call>' + (c.function | tojson) + '</tool_call>' }}{%- endfor -%}"
    "{{ eos_token }}{%- endfor -%}{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
KEY = "the-servers-key"
HI: Any = [{"role": "user", "content": "hi"}]
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOOL: Any = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": PARAMETERS}}
FLAT: Any = {"type": "function", **TOOL["function"], "strict": True}  # as the Responses API writes it
SCHEMA: Any = [{"name": "add", "input_schema": PARAMETERS}]  # as Anthropic writes it
DEEP_ARGUMENTS = '{"a": ' + "[" * 5000 + "]" * 5000 + "}"
DEEP_CALL: Any = {
    "role": "assistant",
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "add", "arguments": DEEP_ARGUMENTS}}],
}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
THOUGHT = "<think>\nhm\n</think>\n\n"


@pytest.fixture(scope="module")
def parts(tiny_model: Path) -> EngineParts:
    return dummy_parts(tiny_model)


def saying(*texts: str) -> Callable[[Sequence[int], Any], list[int]]:
    """Say the texts in turn, then repeat the last. Each text ends a turn, except texts with `...` at the end."""
    left = list(texts)

    def says(prompt: Sequence[int], params: Any) -> list[int]:
        text = left.pop(0) if len(left) > 1 else left[0]
        return [*TOKENIZER(text, add_special_tokens=False).input_ids, *([] if text.endswith("...") else [EOS])]

    return says


@asynccontextmanager
async def fronted(
    parts: EngineParts, *texts: str, key: str = KEY, limits: Any = None, **changes: Any
) -> AsyncIterator[tuple[Front, DummyLoop, openai.AsyncOpenAI, anthropic.AsyncAnthropic]]:
    """Yield a front, its loop, and the clients of OpenAI and Anthropic. A session with the key `s` is open."""
    loop = DummyLoop(TOKENIZER, saying(*texts))
    front = await open_front(
        loop, parts, FrontSpec(**({"name": "tiny", "template": TEMPLATE, "own_key": KEY} | changes))
    )
    values = {"max_calls": 50, "max_tokens": 900, "seed": 1} | (limits or {})
    front.sessions.open("s", Sampling(max_new_tokens=200, temperature=0.7, top_k=9), SessionLimits(**values))
    options: Any = {"api_key": key, "max_retries": 0, "timeout": 20.0}
    client = openai.AsyncOpenAI(base_url=f"{front.base_url}/v1", **options)
    try:
        async with client, anthropic.AsyncAnthropic(base_url=front.base_url, **options) as other:
            yield front, loop, client, other
    finally:
        await front.close()


in_session = partial(fronted, key="s")


async def chatted(client: Any, *, stream: bool = False, **ask: Any) -> tuple[str, str, list[tuple[str, str]], str]:
    """Return the text, the reasoning, the calls as (name, arguments) and the finish reason of an answer."""
    told = await client.chat.completions.create(**{"model": "tiny", "messages": HI} | ask, stream=stream)
    choices = [chunk.choices[0] async for chunk in told] if stream else told.choices
    parts_of = [choice.delta if stream else choice.message for choice in choices]
    calls: list[tuple[str, str]] = []
    for call in [call.function for part in parts_of for call in part.tool_calls or ()]:
        name, arguments = (call.name, "") if call.name else calls.pop()
        calls.append((name, arguments + (call.arguments or "")))
    text = "".join(part.content or "" for part in parts_of)
    return text, "".join(getattr(p, "reasoning", None) or "" for p in parts_of), calls, choices[-1].finish_reason


async def responded(client: openai.AsyncOpenAI, *, stream: bool = False, **ask: Any) -> Any:
    told: Any = await client.responses.create(**{"model": "tiny", "input": "hi"} | ask, stream=stream)
    return [event async for event in told][-1].response if stream else told


async def messaged(client: anthropic.AsyncAnthropic, *, stream: bool = False, **ask: Any) -> Any:
    ask = {"model": "tiny", "max_tokens": 199, "messages": HI} | ask
    if not stream:
        return await client.messages.create(**ask)
    async with client.messages.stream(**ask) as events:
        return await events.get_final_message()


async def posted(front: Front, path: str, body: Any, *, key: str = KEY) -> tuple[int, Any]:
    async with ClientSession(headers={"Authorization": f"Bearer {key}"}) as client:
        answer = await client.post(f"{front.base_url}/v1/{path}", json={"model": "tiny"} | body)
        return answer.status, await answer.json()


def accepts(params: Any, text: str) -> bool:
    """Return whether the grammar of a request allows a text."""
    info = xgrammar.TokenizerInfo.from_huggingface(TOKENIZER)
    grammar = xgrammar.GrammarCompiler(info).compile_structural_tag(params.structured_outputs.structural_tag)
    return xgrammar.GrammarMatcher(grammar).accept_string(text)


# Answers


async def test_a_conversation_of_openai(parts: EngineParts) -> None:
    async with fronted(parts, "yes\nno") as (_, loop, client, _):
        assert [model.id async for model in await client.models.list()] == ["tiny"]
        ask: Any = {"model": "tiny", "messages": [{"role": "system", "content": "S"}, *HI], "n": 2, "user": "me"}
        ask |= {"temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": "\n", "max_completion_tokens": 30}
        more = {"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2}
        told = await client.chat.completions.create(**ask, logprobs=True, top_logprobs=1, extra_body=more)
        assert [(choice.message.content, choice.finish_reason) for choice in told.choices] == [("yes", "stop")] * 2
        content = told.choices[0].logprobs.content
        assert [(token.token, token.logprob) for token in content[:3]] == [("y", -0.5), ("e", -1.5), ("s", -2.5)]
        assert told.usage.completion_tokens == 14
        (asked,) = loop.asked
        assert TOKENIZER.decode(asked.prompt_token_ids) == "<|system|>S<|eos|><|user|>hi<|eos|><|assistant|>"
        params = asked.params
        assert (params.temperature, params.top_p, params.seed, params.max_tokens) == (0.5, 0.9, 3, 30)
        assert (params.top_k, params.min_p, params.repetition_penalty) == (7, 0.1, 1.2)
        usage: Any = {"include_usage": True}
        stream = await client.chat.completions.create(model="tiny", messages=HI, stream=True, stream_options=usage)
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "yes\nno"
        assert chunks[-1].usage.completion_tokens == 7


async def test_completions_and_what_is_sampled_unless_the_client_says_otherwise(parts: EngineParts) -> None:
    async with fronted(parts, "one", turn_ends=(7,)) as (_, loop, client, _):
        await chatted(client, stop=["<|user|>", "Q"])
        await chatted(client, extra_body={"ignore_eos": True})
        told = await client.completions.create(model="tiny", prompt=["ab", "cd"], n=2, logprobs=1)
        assert [choice.text for choice in told.choices] == ["one"] * 4
        assert told.choices[0].logprobs.token_logprobs[0] == -0.5
        chat, endless, *texts = loop.asked
        assert {TOKENIZER.decode(asked.prompt_token_ids) for asked in texts} == {"ab", "cd"}
        text = texts[0].params
        assert (chat.params.temperature, text.temperature, text.max_tokens) == (1.0, 1.0, 16)
        user = TOKENIZER.convert_tokens_to_ids("<|user|>")
        assert set(chat.params.stop_token_ids) == {user, 7}  # a stop string that is a token ends by its id
        assert {user, 7} <= set(chat.params.all_stop_token_ids)
        assert set(text.stop_token_ids) == set(endless.params.stop_token_ids) == set()
        stream = await client.completions.create(model="tiny", prompt="ab", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "one"


@pytest.mark.parametrize("stream", [False, True])
async def test_tools_and_reasoning_in_each_protocol(parts: EngineParts, stream: bool) -> None:
    texts = (f"{THOUGHT}wait {CALL}", CALL, f"{THOUGHT}wait {CALL}")
    async with fronted(parts, *texts, reasoning_parser="qwen3") as (_, loop, client, other):
        _, reasoning, ((name, arguments),), reason = await chatted(client, tools=[TOOL], stream=stream)
        assert (name, json.loads(arguments), reasoning.strip(), reason) == ("add", {"a": 1}, "hm", "tool_calls")
        response = await responded(client, instructions="S", tools=[FLAT], store=True, stream=stream)
        (call,) = [item for item in response.output if item.type == "function_call"]
        assert (call.name, json.loads(call.arguments), response.status) == ("add", {"a": 1}, "completed")
        greedy = {"temperature": 0.5}  # no argument of the client's any more
        message = await messaged(other, system="S", tools=SCHEMA, extra_body=greedy, stream=stream)
        *_, text, call = message.content
        assert (text.text.strip(), call.name, call.input) == ("wait", "add", {"a": 1})
        assert (message.stop_reason, loop.asked[-1].params.temperature) == ("tool_use", 0.5)
        assert (await other.messages.count_tokens(model="tiny", messages=HI)).input_tokens == 5


# Capture


async def test_a_session_is_sampled_as_the_run_samples_and_captured(parts: EngineParts) -> None:
    async with in_session(parts, "yes", turn_ends=(7,)) as (front, loop, client, _):
        loop.version = 4
        ask: Any = {"temperature": 0.1, "top_p": 0.5, "seed": 77, "presence_penalty": 1.0, "logit_bias": {"5": 100}}
        # A program names the model as it likes, and asks for more tokens than the model has.
        assert (await chatted(client, model="gpt-5", max_tokens=64_000, stop=["Q"], **ask))[0] == "yes"
        loop.first_version, loop.version = 4, 5  # an update within the second response
        await chatted(client, messages=[*HI, {"role": "assistant", "content": "yes"}, *HI], max_tokens=3)
        first, second = (submission.params for submission in loop.asked)
        assert (first.temperature, first.top_p, first.top_k, first.presence_penalty) == (0.7, 1.0, 9, 0.0)
        assert (first.logit_bias, first.stop, first.max_tokens, second.max_tokens) == (None, ["Q"], 200, 3)
        assert (first.seed, first.seed == second.seed, set(first.stop_token_ids)) == (1, False, {7})
        calls = front.sessions.close("s")
        assert TOKENIZER.decode(calls[0].prompt_ids) == "<|user|>hi<|eos|><|assistant|>"
        assert calls[0].response_ids.tolist() == [*b"yes", EOS]
        assert calls[0].logprobs.tolist() == [-0.5, -1.5, -2.5, -3.5]
        assert (calls[0].free.tolist(), calls[0].finish_reason, calls[0].broke) == ([True] * 4, "stop", None)
        (whole,) = training_sequences(calls)
        assert [version for version in whole.versions.tolist() if version >= 0] == [4] * 5 + [5] * 2
        with pytest.raises(openai.AuthenticationError):
            await chatted(client)


def assert_extends(calls: list[Call]) -> None:
    """Each prompt begins with the previous prompt and response, token by token."""
    for before, after in pairwise(calls):
        whole = [*before.prompt_ids.tolist(), *before.response_ids.tolist()]
        assert after.prompt_ids[: len(whole)].tolist() == whole
    assert [call.broke for call in calls] == [None] * len(calls)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_conversation_of_openai_goes_on_from_the_sampled_tokens(
    parts: EngineParts, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The turns have surrounding space, reasoning, and calls in a form different from the template's."""
    monkeypatch.setattr("actors.serving.front_renderer.LONG_TEXT", 60)  # beyond, a thread tokenises
    texts = (f"{THOUGHT}  wait {CALL}", " fine ", "and so on...", "end")
    async with in_session(parts, *texts, reasoning_parser="qwen3") as (front, _, client, _):
        messages, long = [*HI], {"role": "user", "content": "x" * 60}
        for asked in ({"role": "tool", "tool_call_id": "x", "content": "2"}, long, *HI, None):
            content, _, calls, _ = await chatted(client, messages=messages, tools=[TOOL], stream=stream)
            said: dict[str, Any] = {"role": "assistant", "content": content.strip()}
            for name, arguments in calls:
                function = {"name": name, "arguments": json.dumps(json.loads(arguments))}
                said["tool_calls"] = [{"id": "x", "type": "function", "function": function}]
            messages += [said, asked] if asked else []
        captured = front.sessions.close("s")
        assert_extends(captured)
        assert TOKENIZER.decode(captured[2].prompt_ids).endswith(f" fine <|eos|><|user|>{'x' * 60}<|eos|><|assistant|>")
        assert TOKENIZER.decode(captured[3].prompt_ids).endswith("and so on...<|eos|><|user|>hi<|eos|><|assistant|>")


async def test_a_conversation_of_anthropic_and_of_responses_goes_on_from_the_sampled_tokens(parts: EngineParts) -> None:
    async with in_session(parts, f"wait {CALL}", " done ", "end") as (front, _, _, other):
        messages: list[Any] = [*HI]
        for _ in range(3):
            told = await messaged(other, max_tokens=64_000, messages=messages, tools=SCHEMA)
            used = [block.id for block in told.content if block.type == "tool_use"]
            results = [{"type": "tool_result", "tool_use_id": name, "content": "2"} for name in used]
            messages += [{"role": "assistant", "content": [block.model_dump() for block in told.content]}]
            messages += [{"role": "user", "content": results or "go on"}]
        assert_extends(front.sessions.close("s"))
    async with in_session(parts, f"wait {CALL}", " done ", "end") as (front, loop, client, _):
        items: list[Any] = [*HI]
        for _ in range(3):
            output = (await responded(client, input=items, instructions="S", tools=[FLAT])).output
            used = [item.call_id for item in output if item.type == "function_call"]
            results = [{"type": "function_call_output", "call_id": name, "output": "2"} for name in used]
            items += [item.model_dump(exclude_none=True) for item in output]
            items += results or [{"role": "user", "content": "go on"}]
        assert all(submission.params.structured_outputs is None for submission in loop.asked)  # `strict` is ignored
        assert_extends(front.sessions.close("s"))


async def test_a_turn_that_ended_by_itself_gets_no_second_end(parts: EngineParts) -> None:
    """The template ends a turn with another token than the model, and writes a space before the end."""
    end = "<|reserved_0|>"
    template, ends = TEMPLATE.replace("{{ eos_token }}", "{{ ' " + end + "' }}"), (parts.added[end],)
    async with in_session(parts, "yes", "cut...", "no", template=template, turn_ends=ends) as (front, _, client, _):
        messages = [*HI]
        for _ in range(3):
            messages += [{"role": "assistant", "content": (await chatted(client, messages=messages))[0]}, *HI]
        calls = front.sessions.close("s")
        assert_extends(calls)
        ask = f"<|user|>hi {end}<|assistant|>"
        assert TOKENIZER.decode(calls[2].prompt_ids) == f"{ask}yes<|eos|>{ask}cut... {end}{ask}"


async def test_a_broken_prefix_is_said_and_tokens_under_a_grammar_are_marked(parts: EngineParts) -> None:
    async with in_session(parts, "yes") as (front, loop, client, _):
        for said in ("yes", "no"):
            await chatted(client)
            await chatted(client, messages=[*HI, {"role": "assistant", "content": said}, *HI])
        form: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": PARAMETERS, "strict": True}}
        await client.chat.completions.create(model="m", messages=HI, n=2, response_format=form)
        assert loop.asked[-1].params.structured_outputs.json is not None
        *calls, formed, second = front.sessions.close("s")
        assert [call.broke for call in calls] == [None, None, None, "edited history"]
        assert [len(sequence.calls) for sequence in training_sequences(calls)] == [2, 1, 1]
        assert [(one.free.any(), one.restriction) for one in (formed, second)] == [(False, "response_format")] * 2


@pytest.mark.parametrize("stream", [False, True])
async def test_a_session_that_wants_one_call_at_a_time_is_sampled_freely_and_told_the_first(
    parts: EngineParts, stream: bool
) -> None:
    """vLLM's parser sets a grammar for such a request, as some parsers do for every request with tools."""
    async with in_session(parts, CALL + CALL) as (front, loop, client, other):
        _, _, calls, _ = await chatted(client, tools=[TOOL], parallel_tool_calls=False, stream=stream)
        choice = {"type": "auto", "disable_parallel_tool_use": True}
        message = await messaged(other, tool_choice=choice, tools=SCHEMA, stream=stream)
        response = await responded(client, tools=[FLAT], parallel_tool_calls=False, stream=stream)
        assert [name for name, _ in calls] == ["add"]
        assert [block.name for block in message.content if block.type == "tool_use"] == ["add"]
        assert [item.name for item in response.output if item.type == "function_call"] == ["add"]
        captured = front.sessions.close("s")
        assert [(call.free.all(), call.restriction) for call in captured] == [(True, None)] * 3
    assert [asked.params.structured_outputs for asked in loop.asked] == [None] * 3


async def test_a_schema_that_no_text_fulfils_is_refused_and_not_captured(parts: EngineParts) -> None:
    """vLLM ends such a response with an error after a token outside the grammar."""
    async with in_session(parts, "x") as (front, loop, client, _):
        loop.end = "error"
        schema: Any = {"$ref": "#"}
        form: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
        text: Any = {"format": {"type": "json_schema", "name": "n", "schema": schema}}
        for asking in (
            chatted(client, response_format=form),
            chatted(client, response_format=form, stream=True),
            responded(client, text=text),
        ):
            with pytest.raises(openai.APIError, match="no text can fulfil it"):
                await asking
        assert front.sessions.close("s") == []


NAMED: Any = {"type": "function", "function": {"name": "add"}}
LOOSE: Any = {"type": "function", "function": {**TOOL["function"], "strict": False}}
CHOICES: dict[str, tuple[Any, Any, Any]] = {  # in the forms of OpenAI's two protocols and of Anthropic's
    "auto": ("auto", "auto", {"type": "auto"}),
    "required": ("required", "required", {"type": "any"}),
    "named": (NAMED, {"type": "function", "name": "add"}, {"type": "tool", "name": "add"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["required", "named"])
@pytest.mark.parametrize(("tool", "arguments"), [(TOOL, '{"a": 1}'), (LOOSE, '{"a": 1}'), (NAMED, "{}")])
async def test_a_forced_call_has_an_object_of_the_tools_schema(
    parts: EngineParts, tool: Any, arguments: str, choice: str
) -> None:
    chat, flat_choice, of_anthropic = CHOICES[choice]
    flat = {"strict": None, "type": "function", **tool["function"]}
    tools = [{"name": "add", "input_schema": flat.get("parameters", {"type": "object", "properties": {}})}]
    asked = []
    for key in (KEY, "s"):
        async with fronted(parts, CALL, key=key) as (_, loop, client, other):
            await chatted(client, tools=[tool], tool_choice=chat)
            await responded(client, tools=[flat], tool_choice=flat_choice)
            await messaged(other, tools=tools, tool_choice=of_anthropic)
            asked += loop.asked
    for submission in asked:
        assert accepts(submission.params, CALL.replace('{"a": 1}', arguments))
        assert not accepts(submission.params, CALL.replace('{"a": 1}', '"recommendate"'))
        assert not accepts(submission.params, CALL.replace('{"a": 1}', '{"a": "x"}'))


CUT = '<tool_call>\n{"name": "add", "arguments": {"a": 1...'
CUT_XML = "<tool_call>\n<function=add>\n<parameter=a>\n1..."
CUT_LIST = '[{"name": "add", "parameters": {"a": 1...'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parser", "text", "choice"),
    [
        ("hermes", CUT, "required"),
        ("hermes", CUT, "auto"),
        ("olmo3", CUT_LIST, "required"),
        ("olmo3", '{"a": 1...', "named"),
        ("qwen3_coder", CUT_XML, "auto"),
    ],
)
async def test_a_call_that_is_cut_off_has_its_arguments_so_far(
    parts: EngineParts, parser: str, text: str, choice: str
) -> None:
    chat, flat_choice, of_anthropic = CHOICES[choice]
    async with fronted(parts, text, tool_parser=parser) as (_, _, client, other):
        content, _, ((_, arguments),), reason = await chatted(client, tools=[TOOL], tool_choice=chat)
        assert (content, reason, arguments[:6], arguments.endswith("}")) == ("", "length", '{"a": ', False)
        streamed = await chatted(client, tools=[TOOL], tool_choice=chat, stream=True)
        assert streamed[2:] == ([("add", arguments)], "length")
        response = await responded(client, tools=[FLAT | {"strict": None}], tool_choice=flat_choice)
        assert response.incomplete_details is not None
        assert [item.arguments for item in response.output] == [arguments]
        message = await messaged(other, tools=SCHEMA, tool_choice=of_anthropic)
        assert message.stop_reason == "max_tokens"
        assert [(block.type, block.name) for block in message.content] == [("tool_use", "add")]


async def test_a_call_that_is_cut_off_before_its_arguments_has_none(parts: EngineParts) -> None:
    async with fronted(parts, '<tool_call>\n{"name": "add", "argum...', tool_parser="hermes") as (_, _, client, _):
        expected = ("", "", [("add", "")], "length")
        assert await chatted(client, tools=[TOOL]) == expected
        assert await chatted(client, tools=[TOOL], stream=True) == expected


async def test_what_json_lacks_in_a_call_is_no_error(parts: EngineParts) -> None:
    written = '{"a": [NaN, -Infinity, 1e999, 2.5], "b": "x\\ud800"}'
    async with in_session(parts, CALL.replace('{"a": 1}', written)) as (front, _, client, other):
        arguments = {"a": [None, None, None, 2.5], "b": "x?"}
        chat = await client.chat.completions.create(model="m", messages=HI, tools=[TOOL])
        (told,) = chat.choices[0].message.tool_calls
        assert json.loads(told.function.arguments) == arguments
        messages = [*HI, chat.choices[0].message, {"role": "tool", "tool_call_id": told.id, "content": "4"}]
        await chatted(client, messages=messages, tools=[TOOL])
        assert json.loads((await responded(client, tools=[FLAT])).output[0].arguments) == arguments
        assert (await messaged(other, tools=SCHEMA)).content[-1].input == arguments
        assert [len(sequence.calls) for sequence in training_sequences(front.sessions.close("s"))] == [2, 1, 1]


async def test_a_closed_session_and_a_client_that_leaves_drop_their_calls(parts: EngineParts) -> None:
    async with in_session(parts, "yes") as (front, loop, client, _):
        loop.hold = True
        waiting = asyncio.create_task(chatted(client))
        await until(lambda: len(loop.waiting) == 1)
        waiting.cancel()
        await until(lambda: not loop.waiting)
        waiting = asyncio.create_task(chatted(client))
        await until(lambda: len(loop.waiting) == 1)
        assert front.sessions.close("s") == []
        with pytest.raises(openai.AuthenticationError, match="the session has ended"):
            await waiting
        await until(lambda: not loop.waiting)


async def test_an_engine_gets_the_adapter_and_its_death_is_told(parts: EngineParts) -> None:
    from vllm import SamplingParams

    async with fronted(parts, "yes") as (_, loop, client, _):
        loop.failure = RunError("rollout engine 0 died")
        with pytest.raises(openai.InternalServerError):
            await chatted(client)
    loop = DummyLoop(TOKENIZER, saying("yes"))
    engine = FrontEngine(loop, parts, ends=(), lora=lambda: "lora")
    CURRENT_CALL.set(ServedCall(None, "served1-"))
    prompt = {"type": "token", "prompt_token_ids": [1], "cache_salt": "the client's"}
    assert [output.finished async for output in engine.generate(prompt, SamplingParams(), "id")] == [True]
    (asked,) = loop.asked
    assert (asked.prompt_token_ids, asked.lora) == ((1,), "lora")
    loop.on_step([])  # nothing waits


# Refusals

CUSTOM = {"id": "c", "type": "custom", "custom": {"name": "add", "input": "x"}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "path", "change", "status", "why"),
    [
        (KEY, "chat/completions", {"web_search_options": {"a": 1}}, 400, "`web_search_options` is not supported here"),
        (KEY, "chat/completions", {"max_tokens": 5000}, 400, "max_tokens"),
        (KEY, "completions", {"prompt": ["a"] * 65, "n": 2}, 400, "asks for 130 responses, more than 128"),
        (KEY, "completions", {"prompt": "x" * 2000}, 400, "maximum context length"),
        (KEY, "chat/completions", {"structured_outputs": 0}, 400, "`structured_outputs` is 0, expected an object"),
        (KEY, "responses", {"background": True}, 400, "`background` is not supported here"),
        (KEY, "responses", {"previous_response_id": "r"}, 404, "send the whole conversation"),
        (KEY, "responses", {"input": [{"role": "assistant", "content": []}]}, 400, "`input[0].content` is empty"),
        (KEY, "chat/completions", {"messages": [*HI, DEEP_CALL]}, 400, "are nested too deeply to be read"),
        (KEY, "messages", {"tools": [{"name": "a", "input_schema": {"type": "string"}}]}, 400, "has the type 'string'"),
        (KEY, "messages", {"model": "other"}, 404, "there is no model other: this server has tiny"),
        ("s", "chat/completions", {"max_tokens": 0}, 400, "`max_tokens` is 0, expected at least 1"),
        ("s", "chat/completions", {"max_completion_tokens": -1}, 400, "`max_completion_tokens` is -1, expected"),
        ("s", "responses", {"max_output_tokens": 0}, 400, "`max_output_tokens` is 0, expected at least 1"),
        ("s", "messages", {"max_tokens": None}, 400, "body.max_tokens"),
        (
            "s",
            "chat/completions",
            {"messages": [{"role": "assistant", "tool_calls": [CUSTOM]}]},
            400,
            "type 'function'",
        ),
        ("s", "chat/completions", {"messages": [{"role": "user", "content": [IMAGE]}]}, 400, "takes only text"),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(
    parts: EngineParts, key: str, path: str, change: dict[str, Any], status: int, why: str
) -> None:
    asks: dict[str, dict[str, Any]] = {
        "chat/completions": {"messages": HI},
        "completions": {"prompt": "ab"},
        "responses": {"input": "hi"},
        "messages": {"messages": HI, "max_tokens": 5},
    }
    async with fronted(parts, "yes") as (front, loop, _, _):
        answered, told = await posted(front, path, asks[path] | change, key=key)
    assert answered == status, told
    assert why in told["error"]["message"]
    assert (told.get("type") == "error") == (path == "messages")
    assert not loop.asked


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 1100}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 99_000}]}),
        ("chat/completions", {"messages": [*HI, {"role": "assistant", "content": "yes"}, *HI * 300]}),
        ("completions", {"prompt": "x" * 1100}),
        ("responses", {"input": "x" * 1100}),
        ("messages", {"messages": [{"role": "user", "content": "x" * 1100}], "max_tokens": 5}),
    ],
)
async def test_a_prompt_that_is_longer_than_the_engines_limit_ends_its_session(
    parts: EngineParts, path: str, body: dict[str, Any]
) -> None:
    async with in_session(parts, "yes", limits={"max_tokens": 1024}) as (front, loop, client, _):  # as the engine takes
        await chatted(client)
        status, told = await posted(front, path, body, key="s")
        assert (status, len(loop.asked)) == (400, 1)
        assert "With its response it may have 1024 tokens (max_tokens)" in told["error"]["message"]
        session = front.sessions.find("s")
        assert (session.exceeded, session.is_over.is_set()) == ("max_tokens", True)


async def test_a_response_has_the_room_behind_its_prompt(parts: EngineParts) -> None:
    async with in_session(parts, "yes", limits={"max_tokens": 1024}) as (_, loop, client, _):
        await client.completions.create(model="m", prompt="x" * 1015, max_tokens=16)
        await client.completions.create(model="m", prompt="x" * 9, max_tokens=16)
        await chatted(client, messages=[{"role": "user", "content": "x" * 1012}])
    assert [asked.params.max_tokens for asked in loop.asked] == [9, 16, 9]


async def test_tools_of_a_model_without_a_parser_are_refused(parts: EngineParts) -> None:
    plain = TEMPLATE.replace("<tool_call>", "").replace("</tool_call>", "")
    why = r"--chat-template FILE.*data\.chat_template"
    async with fronted(parts, "yes", template=plain) as (_, _, client, other):
        with pytest.raises(openai.BadRequestError, match=why):
            await chatted(client, tools=[TOOL])
        assert (await chatted(client, tools=[TOOL], tool_choice="none"))[0] == "yes"
        with pytest.raises(anthropic.BadRequestError, match=why):
            await messaged(other, tools=SCHEMA)
        message = await messaged(other, tools=SCHEMA, tool_choice={"type": "none"})
        assert [block.text for block in message.content if block.type == "text"] == ["yes"]


async def sent(front: Front, chunks: Iterable[bytes]) -> int:
    """Send chunks until the front closes the connection. Return the number of accepted chunks."""
    host, _, port = front.base_url.removeprefix("http://").rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    answer, count = asyncio.create_task(reader.read()), 0
    with suppress(ConnectionError):
        for chunk in chunks:
            count += 1
            writer.write(chunk)
            await writer.drain()
    with suppress(ConnectionError):
        await answer
    return count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (b"", b""),  # nothing
        (b"POST /v1/chat/completions HTTP/1.1\r\n", b""),  # half a head
        (b"POST /v1/chat/completions HTTP/1.1\r\n", b"x: " + b"y" * 60_000 + b"\r\n"),  # an endless head
        (b"GET /" + b"x" * 60_000, b"x" * 60_000),  # an endless address
        (b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n", b"fff0\r\n" + b"x" * 65520 + b"\r\n"),
    ],
)
async def test_a_connection_without_an_end_is_closed(
    parts: EngineParts, begin: bytes, more: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_front, "IDLE_CONNECTION_S", 1.0)
    async with fronted(parts, "yes") as (front, _, client, _):
        count = await asyncio.wait_for(sent(front, [begin, *[more] * 10_000]), 30.0)
        assert count < 10_000 or not more
        assert (await chatted(client))[0] == "yes"


@pytest.mark.slow
async def test_a_connection_in_use_stays_open(parts: EngineParts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_front, "IDLE_CONNECTION_S", 2.0)
    async with fronted(parts, "yes") as (front, _, client, _):
        used = set()
        for _ in range(8):
            await chatted(client)
            used |= set(front._server.server_state.connections)
            await asyncio.sleep(0.4)
        assert len(used) == 1


@pytest.mark.slow
async def test_a_reader_that_stops_ends_with_its_session(parts: EngineParts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_front, "IDLE_CONNECTION_S", 1.0)
    async with fronted(parts, "yes") as (front, loop, _, _):
        loop.hold = True
        host, _, port = front.base_url.removeprefix("http://").rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        body = json.dumps({"model": "m", "messages": HI, "stream": True}).encode()
        head = f"POST /s/s/v1/chat/completions HTTP/1.1\r\ncontent-length: {len(body)}\r\n"
        writer.write(f"{head}content-type: application/json\r\n\r\n".encode() + body)
        connections = front._server.server_state.connections
        while not loop.waiting:
            await asyncio.sleep(0.01)
        front.sessions.close("s")
        while connections:
            await asyncio.sleep(0.05)
        writer.close()

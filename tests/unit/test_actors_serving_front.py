"""The front over an engine without a model, asked by OpenAI's and Anthropic's own clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
import xgrammar
from aiohttp import ClientSession

from actors.serving import front as serving_front
from actors.serving.front import Front, FrontSpec
from actors.serving.front_engine import EngineParts
from rlhf.agents.calls import Call
from rlhf.agents.limits import SessionLimits
from rlhf.agents.trees import training_sequences
from rlhf.models.files.tiny import byte_tokenizer
from rlhf.types import Sampling
from tests.dummy_engine import DummyLoop, dummy_parts, open_front
from tests.fakes.calls import until

pytestmark = pytest.mark.slow  # vLLM is imported

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
async def fronted(parts: EngineParts, *texts: str, **changes: Any) -> AsyncIterator[tuple[Front, DummyLoop]]:
    loop = DummyLoop(TOKENIZER, saying(*texts))
    spec = FrontSpec(**({"name": "tiny", "template": TEMPLATE, "own_key": KEY} | changes))
    front = await open_front(loop, parts, spec)
    try:
        yield front, loop
    finally:
        await front.close()


def openai_client(front: Front, key: str = KEY) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{front.base_url}/v1", api_key=key, max_retries=0, timeout=20.0)


def anthropic_client(front: Front, key: str = KEY) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=front.base_url, api_key=key, max_retries=0, timeout=20.0)


def opened(front: Front, key: str = "a-session", **limits: Any) -> Any:
    values = {"max_calls": 50, "max_tokens": 900, "seed": 1} | limits
    return front.sessions.open(key, Sampling(max_new_tokens=200, temperature=0.7, top_k=9), SessionLimits(**values))


@asynccontextmanager
async def in_session(
    parts: EngineParts, *texts: str, max_tokens: int = 900, **changes: Any
) -> AsyncIterator[tuple[Front, DummyLoop, openai.AsyncOpenAI]]:
    """Yield a front with an open session, and OpenAI's client of the session."""
    async with fronted(parts, *texts, **changes) as (front, loop), openai_client(front, "a-session") as client:
        opened(front, max_tokens=max_tokens)
        yield front, loop, client


def accepts(params: Any, text: str) -> bool:
    """Return whether the grammar of a request allows a text."""
    info = xgrammar.TokenizerInfo.from_huggingface(TOKENIZER)
    grammar = xgrammar.GrammarCompiler(info).compile_structural_tag(params.structured_outputs.structural_tag)
    return xgrammar.GrammarMatcher(grammar).accept_string(text)


# Answers


async def test_a_conversation_of_openai(parts: EngineParts) -> None:
    async with fronted(parts, "yes\nno") as (front, loop), openai_client(front) as client:
        assert [model.id async for model in await client.models.list()] == ["tiny"]
        told = await client.chat.completions.create(
            model="tiny",
            messages=[{"role": "system", "content": "S"}, *HI],
            n=2,
            temperature=0.5,
            top_p=0.9,
            seed=3,
            stop="\n",
            max_completion_tokens=30,
            logprobs=True,
            top_logprobs=1,
            user="me",
            extra_body={"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2},
        )
        assert [choice.message.content for choice in told.choices] == ["yes", "yes"]
        assert [choice.finish_reason for choice in told.choices] == ["stop", "stop"]
        content = told.choices[0].logprobs.content
        assert [(token.token, token.logprob) for token in content[:3]] == [("y", -0.5), ("e", -1.5), ("s", -2.5)]
        assert told.usage.completion_tokens == 14
        (asked,) = loop.asked
        assert TOKENIZER.decode(asked.prompt_token_ids) == "<|system|>S<|eos|><|user|>hi<|eos|><|assistant|>"
        params = asked.params
        assert (params.temperature, params.top_p, params.seed, params.max_tokens) == (0.5, 0.9, 3, 30)
        assert (params.top_k, params.min_p, params.repetition_penalty) == (7, 0.1, 1.2)
        stream = await client.chat.completions.create(
            model="tiny", messages=HI, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "yes\nno"
        assert chunks[-1].usage.completion_tokens == 7


async def test_temperature_is_1_unless_given_and_turns_end_where_the_template_says(parts: EngineParts) -> None:
    async with fronted(parts, "yes", turn_ends=(7,)) as (front, loop), openai_client(front) as client:
        await client.chat.completions.create(model="tiny", messages=HI, stop=["<|user|>", "Q"])
        await client.completions.create(model="tiny", prompt="ab")
        chat, text = (submission.params for submission in loop.asked)
        assert (chat.temperature, text.temperature, text.max_tokens) == (1.0, 1.0, 16)
        user = TOKENIZER.convert_tokens_to_ids("<|user|>")
        assert set(chat.stop_token_ids) == {user, 7}  # a stop string that is a token ends by its id
        assert set(text.stop_token_ids) == set()


async def test_completions(parts: EngineParts) -> None:
    async with fronted(parts, "one") as (front, loop), openai_client(front) as client:
        told = await client.completions.create(model="tiny", prompt=["ab", "cd"], n=2, logprobs=1, max_tokens=9)
        assert [choice.text for choice in told.choices] == ["one"] * 4
        assert told.choices[0].logprobs.token_logprobs[0] == -0.5
        assert {TOKENIZER.decode(asked.prompt_token_ids) for asked in loop.asked} == {"ab", "cd"}
        stream = await client.completions.create(model="tiny", prompt="ab", stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "one"


@pytest.mark.parametrize("streams", [False, True])
async def test_tools_and_reasoning_of_openai(parts: EngineParts, streams: bool) -> None:
    async with (
        fronted(parts, f"{THOUGHT}wait {CALL}", reasoning_parser="qwen3") as (front, _),
        openai_client(front) as client,
    ):
        ask: dict[str, Any] = {"model": "tiny", "messages": HI, "tools": [TOOL]}
        if streams:
            name = arguments = reasoning = ""
            async for chunk in await client.chat.completions.create(**ask, stream=True):
                delta = chunk.choices[0].delta
                reasoning += getattr(delta, "reasoning", None) or ""
                for call in delta.tool_calls or ():
                    name += call.function.name or ""
                    arguments += call.function.arguments or ""
        else:
            choice = (await client.chat.completions.create(**ask)).choices[0]
            assert choice.finish_reason == "tool_calls"
            (call,) = choice.message.tool_calls
            name, arguments, reasoning = call.function.name, call.function.arguments, choice.message.reasoning
        assert (name, json.loads(arguments), reasoning.strip()) == ("add", {"a": 1}, "hm")


@pytest.mark.parametrize("streams", [False, True])
async def test_responses(parts: EngineParts, streams: bool) -> None:
    tool: Any = {"type": "function", "name": "add", "parameters": PARAMETERS, "strict": True}
    async with fronted(parts, CALL) as (front, _), openai_client(front) as client:
        ask: dict[str, Any] = {"model": "tiny", "input": "hi", "instructions": "S", "tools": [tool], "store": True}
        if streams:
            events = [event async for event in await client.responses.create(**ask, stream=True)]
            assert events[-1].type == "response.completed"
            told = events[-1].response
        else:
            told = await client.responses.create(**ask)
        (call,) = [item for item in told.output if item.type == "function_call"]
        assert (call.name, json.loads(call.arguments)) == ("add", {"a": 1})
        with pytest.raises(openai.NotFoundError, match="send the whole conversation"):
            await client.responses.create(model="tiny", input="hi", previous_response_id="resp_1")


@pytest.mark.parametrize("streams", [False, True])
async def test_anthropics_messages(parts: EngineParts, streams: bool) -> None:
    async with fronted(parts, f"wait {CALL}") as (front, loop), anthropic_client(front) as client:
        ask: dict[str, Any] = {
            "model": "tiny",
            "max_tokens": 100,
            "system": "S",
            "messages": HI,
            "tools": [{"name": "add", "input_schema": PARAMETERS}],
            "extra_body": {"temperature": 0.5},  # no argument of the client's any more
        }
        if streams:
            async with client.messages.stream(**ask) as stream:
                told = await stream.get_final_message()
        else:
            told = await client.messages.create(**ask)
        text, call = told.content
        assert text.text.strip() == "wait"
        assert loop.asked[0].params.temperature == 0.5
        assert (call.name, call.input, told.stop_reason) == ("add", {"a": 1}, "tool_use")
        counted = await client.messages.count_tokens(model="tiny", messages=HI)
        assert counted.input_tokens == 5
        with pytest.raises(anthropic.NotFoundError, match="there is no model other"):
            await client.messages.create(model="other", max_tokens=1, messages=HI)


# Capture


async def test_a_session_goes_on_over_an_update_and_each_token_has_its_version(parts: EngineParts) -> None:
    async with in_session(parts, "yes", "no") as (front, loop, client):
        loop.version = 4
        told = await client.chat.completions.create(model="m", messages=HI)
        loop.version = 5
        answer = {"role": "assistant", "content": told.choices[0].message.content}
        await client.chat.completions.create(model="m", messages=[*HI, answer, *HI])
        calls = front.sessions.close("a-session")
        (whole,) = training_sequences(calls)
        assert [version for version in whole.versions.tolist() if version >= 0] == [4] * 4 + [5] * 3


async def test_a_session_is_sampled_as_the_run_samples_and_captured(parts: EngineParts) -> None:
    async with in_session(parts, "yes", turn_ends=(7,)) as (front, loop, client):
        loop.version = 4
        told = await client.chat.completions.create(
            model="gpt-5",  # named as the program likes
            messages=HI,
            temperature=0.1,
            top_p=0.5,
            seed=77,
            presence_penalty=1.0,
            logit_bias={"5": 100},
            max_tokens=64_000,  # more than the model has
            stop=["Q"],
        )
        assert told.choices[0].message.content == "yes"
        await client.chat.completions.create(model="gpt-5", messages=HI, max_tokens=3)
        first, second = (submission.params for submission in loop.asked)
        assert (first.temperature, first.top_p, first.top_k, first.presence_penalty) == (0.7, 1.0, 9, 0.0)
        assert (first.logit_bias, first.stop, first.max_tokens, second.max_tokens) == (None, ["Q"], 200, 3)
        assert (first.seed, first.seed == second.seed, set(first.stop_token_ids)) == (1, False, {7})
        call, _ = front.sessions.close("a-session")
        assert TOKENIZER.decode(call.prompt_ids) == "<|user|>hi<|eos|><|assistant|>"
        assert call.response_ids.tolist() == [*b"yes", EOS]
        assert call.logprobs.tolist() == [-0.5, -1.5, -2.5, -3.5]
        assert (call.versions.tolist(), call.free.tolist()) == ([4] * 4, [True] * 4)
        assert (call.finish_reason, call.broke) == ("stop", None)
        with pytest.raises(openai.AuthenticationError):
            await client.chat.completions.create(model="gpt-5", messages=HI)


def assert_extends(calls: list[Call]) -> None:
    """Each prompt begins with the previous prompt and response, token by token."""
    for before, after in pairwise(calls):
        whole = [*before.prompt_ids.tolist(), *before.response_ids.tolist()]
        assert after.prompt_ids[: len(whole)].tolist() == whole
    assert [call.broke for call in calls] == [None] * len(calls)


@pytest.mark.parametrize("streams", [False, True])
async def test_a_conversation_of_openai_goes_on_from_the_sampled_tokens(parts: EngineParts, streams: bool) -> None:
    """The turns have surrounding space, reasoning, and calls in a form different from the template's."""
    texts = (f"{THOUGHT}  wait {CALL}", " fine ", "and so on...", "end")
    async with in_session(parts, *texts, reasoning_parser="qwen3") as (front, _, client):
        messages = [*HI]
        for asked in ({"role": "tool", "tool_call_id": "x", "content": "2"}, *HI, *HI, None):
            content, name, arguments = "", "", ""
            told = await client.chat.completions.create(model="m", messages=messages, tools=[TOOL], stream=streams)
            parts_of = [chunk.choices[0].delta async for chunk in told] if streams else [told.choices[0].message]
            for part in parts_of:
                content += part.content or ""
                for call in part.tool_calls or ():
                    name += call.function.name or ""
                    arguments += call.function.arguments or ""
            said: dict[str, Any] = {"role": "assistant", "content": content.strip()}
            if name:
                function = {"name": name, "arguments": json.dumps(json.loads(arguments))}
                said["tool_calls"] = [{"id": "x", "type": "function", "function": function}]
            messages += [said, asked] if asked else []
        calls = front.sessions.close("a-session")
        assert_extends(calls)
        assert TOKENIZER.decode(calls[3].prompt_ids).endswith("and so on...<|eos|><|user|>hi<|eos|><|assistant|>")


async def test_a_conversation_of_anthropic_and_of_responses_goes_on_from_the_sampled_tokens(parts: EngineParts) -> None:
    async with fronted(parts, f"wait {CALL}", " done ", "end") as (front, _), anthropic_client(front, "a") as client:
        opened(front, "a")
        tools: Any = [{"name": "add", "input_schema": PARAMETERS}]
        messages: list[Any] = [*HI]
        for _ in range(2):
            told = await client.messages.create(model="m", max_tokens=64_000, messages=messages, tools=tools)
            results = [
                {"type": "tool_result", "tool_use_id": block.id, "content": "2"}
                for block in told.content
                if block.type == "tool_use"
            ]
            messages += [{"role": "assistant", "content": [block.model_dump() for block in told.content]}]
            messages += [{"role": "user", "content": results or "go on"}]
        await client.messages.create(model="m", max_tokens=64_000, messages=messages, tools=tools)
        assert_extends(front.sessions.close("a"))
    tool: Any = {"type": "function", "name": "add", "parameters": PARAMETERS, "strict": True}
    async with fronted(parts, f"wait {CALL}", " done ", "end") as (front, loop), openai_client(front, "b") as other:
        opened(front, "b")
        items: list[Any] = [*HI]
        for _ in range(3):
            response = await other.responses.create(model="m", input=items, instructions="S", tools=[tool])
            items += [item.model_dump(exclude_none=True) for item in response.output]
            items += [
                {"type": "function_call_output", "call_id": item.call_id, "output": "2"}
                for item in response.output
                if item.type == "function_call"
            ] or [{"role": "user", "content": "go on"}]
        assert all(submission.params.structured_outputs is None for submission in loop.asked)  # `strict` is ignored
        assert_extends(front.sessions.close("b"))


async def test_a_turn_that_ended_by_itself_gets_no_second_end(parts: EngineParts) -> None:
    """The template ends a turn with another token than the model, and writes a space before the end."""
    end = "<|reserved_0|>"
    template, ends = TEMPLATE.replace("{{ eos_token }}", "{{ ' " + end + "' }}"), (parts.added[end],)
    async with in_session(parts, "yes", "cut...", "no", template=template, turn_ends=ends) as (front, _, client):
        messages = [*HI]
        for _ in range(3):
            told = await client.chat.completions.create(model="m", messages=messages)
            messages += [{"role": "assistant", "content": told.choices[0].message.content}, *HI]
        calls = front.sessions.close("a-session")
        assert_extends(calls)
        ask = f"<|user|>hi {end}<|assistant|>"
        assert TOKENIZER.decode(calls[2].prompt_ids) == f"{ask}yes<|eos|>{ask}cut... {end}{ask}"


async def test_a_broken_prefix_is_said(parts: EngineParts) -> None:
    async with in_session(parts, "yes") as (front, _, client):
        for said in ("yes", "no"):
            await client.chat.completions.create(model="m", messages=HI)
            await client.chat.completions.create(model="m", messages=[*HI, {"role": "assistant", "content": said}, *HI])
        calls = front.sessions.close("a-session")
        assert [call.broke for call in calls] == [None, None, None, "edited history"]
        assert [len(sequence.calls) for sequence in training_sequences(calls)] == [2, 1, 1]


async def test_tokens_under_a_grammar_are_marked(parts: EngineParts) -> None:
    async with in_session(parts, '{"a": 1}') as (front, loop, client):
        form: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": PARAMETERS, "strict": True}}
        await client.chat.completions.create(model="m", messages=HI, response_format=form)
        (call,) = front.sessions.close("a-session")
        assert not call.free.any()
        assert call.restriction == "response_format"
        assert loop.asked[0].params.structured_outputs.json is not None


@pytest.mark.parametrize("streams", [False, True])
async def test_a_session_that_wants_one_call_at_a_time_is_sampled_freely_and_told_the_first(
    parts: EngineParts, streams: bool
) -> None:
    """vLLM's parser sets a grammar for such a request, as some parsers do for every request with tools."""
    async with (
        fronted(parts, CALL + CALL) as (front, loop),
        openai_client(front, "a-session") as client,
        anthropic_client(front, "a-session") as other,
    ):
        opened(front)
        one: dict[str, Any] = {"model": "m", "parallel_tool_calls": False}
        tool: Any = {"type": "function", **TOOL["function"]}
        choice: Any = {"type": "auto", "disable_parallel_tool_use": True}
        ask: dict[str, Any] = {"model": "m", "max_tokens": 199, "messages": HI, "tool_choice": choice}
        ask["tools"] = [{"name": "add", "input_schema": PARAMETERS}]
        if streams:
            chunks = await client.chat.completions.create(messages=HI, tools=[TOOL], stream=True, **one)
            calls = [call async for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
            names = [call.function.name for call in calls if call.function.name]
            async with other.messages.stream(**ask) as stream:
                message = await stream.get_final_message()
            *_, last = [
                event async for event in await client.responses.create(input="hi", tools=[tool], stream=True, **one)
            ]
            response = last.response
        else:
            told = await client.chat.completions.create(messages=HI, tools=[TOOL], **one)
            names = [call.function.name for call in told.choices[0].message.tool_calls or ()]
            message = await other.messages.create(**ask)
            response = await client.responses.create(input="hi", tools=[tool], **one)
        assert names == ["add"]
        assert [block.name for block in message.content if block.type == "tool_use"] == ["add"]
        assert [item.name for item in response.output if item.type == "function_call"] == ["add"]
        captured = front.sessions.close("a-session")
        assert len(captured) == 3
        assert all(call.free.all() and call.restriction is None for call in captured)
    assert [asked.params.structured_outputs for asked in loop.asked] == [None] * 3


async def test_a_session_takes_text_alone(parts: EngineParts) -> None:
    async with in_session(parts, "yes") as (_, loop, client):
        image: Any = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
        with pytest.raises(openai.BadRequestError, match="a session takes text alone"):
            await client.chat.completions.create(model="m", messages=[{"role": "user", "content": [image]}])
        assert not loop.asked


async def test_a_long_result_is_tokenized_as_a_short_one(parts: EngineParts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.serving.front_renderer.LONG_TEXT", 30)
    async with in_session(parts, "yes") as (front, _, client):
        said = {"role": "assistant", "content": "yes"}
        await client.chat.completions.create(model="m", messages=HI)
        await client.chat.completions.create(model="m", messages=[*HI, said, {"role": "user", "content": "x" * 50}])
        calls = front.sessions.close("a-session")
        assert_extends(calls)
        assert TOKENIZER.decode(calls[1].prompt_ids).endswith(f"yes<|eos|><|user|>{'x' * 50}<|eos|><|assistant|>")


async def test_a_schema_that_no_text_fulfils_is_refused_and_not_captured(parts: EngineParts) -> None:
    """vLLM ends such a response with an error after a token outside the grammar."""
    async with in_session(parts, "x") as (front, loop, client):
        loop.end = "error"
        schema: Any = {"$ref": "#"}
        form: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
        with pytest.raises(openai.BadRequestError, match="no text can fulfil it"):
            await client.chat.completions.create(model="m", messages=HI, response_format=form)
        with pytest.raises(openai.APIError, match="no text can fulfil it"):
            async for _ in await client.chat.completions.create(
                model="m", messages=HI, response_format=form, stream=True
            ):
                pass
        text: Any = {"format": {"type": "json_schema", "name": "n", "schema": schema}}
        with pytest.raises(openai.BadRequestError, match="no text can fulfil it"):
            await client.responses.create(model="m", input="hi", text=text)
        assert front.sessions.close("a-session") == []


NAMED: Any = {"type": "function", "function": {"name": "add"}}
LOOSE: Any = {"type": "function", "function": {**TOOL["function"], "strict": False}}
BARE: Any = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize(("tool", "arguments"), [(TOOL, '{"a": 1}'), (LOOSE, '{"a": 1}'), (BARE, "{}")])
async def test_a_forced_call_has_an_object_of_the_tools_schema(
    parts: EngineParts, tool: Any, arguments: str, choice: Any
) -> None:
    async with (
        fronted(parts, CALL) as (front, loop),
        openai_client(front) as client,
        openai_client(front, "a-session") as agent,
        anthropic_client(front) as other,
    ):
        opened(front)
        name, flat = {"type": "function", "name": "add"}, {"type": "function", **tool["function"]}
        for asker in (client, agent):
            await asker.chat.completions.create(model="tiny", messages=HI, tools=[tool], tool_choice=choice)
        forced: Any = choice if choice == "required" else name
        await client.responses.create(model="tiny", input="hi", tools=[{"strict": None, **flat}], tool_choice=forced)
        tools: Any = [{"name": "add", "input_schema": flat.get("parameters", {"type": "object", "properties": {}})}]
        forced = {"type": "any"} if choice == "required" else {"type": "tool", "name": "add"}
        await other.messages.create(model="tiny", messages=HI, max_tokens=99, tools=tools, tool_choice=forced)
    for asked in loop.asked:
        assert accepts(asked.params, CALL.replace('{"a": 1}', arguments))
        assert not accepts(asked.params, CALL.replace('{"a": 1}', '"recommendate"'))
        assert not accepts(asked.params, CALL.replace('{"a": 1}', '{"a": "x"}'))


CUT = '<tool_call>\n{"name": "add", "arguments": {"a": 1...'
CUT_XML = "<tool_call>\n<function=add>\n<parameter=a>\n1..."
CUT_LIST = '[{"name": "add", "parameters": {"a": 1...'


@pytest.mark.parametrize(
    ("parser", "text", "choice"),
    [
        ("hermes", CUT, "required"),
        ("hermes", CUT, "auto"),
        ("olmo3", CUT_LIST, "required"),
        ("olmo3", '{"a": 1...', NAMED),
        ("qwen3_coder", CUT_XML, "auto"),
    ],
)
async def test_a_call_that_is_cut_off_has_its_arguments_so_far(
    parts: EngineParts, parser: str, text: str, choice: Any
) -> None:
    async with (
        fronted(parts, text, tool_parser=parser) as (front, _),
        openai_client(front) as client,
        anthropic_client(front) as other,
    ):
        ask: dict[str, Any] = {"model": "tiny", "messages": HI, "tools": [TOOL], "tool_choice": choice}
        whole = (await client.chat.completions.create(**ask)).choices[0]
        (call,) = whole.message.tool_calls
        assert (whole.finish_reason, whole.message.content or "") == ("length", "")
        assert call.function.arguments.startswith('{"a": ')
        assert not call.function.arguments.endswith("}")
        chunks = [chunk.choices[0] async for chunk in await client.chat.completions.create(**ask, stream=True)]
        parts_told = [part.function for chunk in chunks for part in chunk.delta.tool_calls or ()]
        assert "".join(part.arguments or "" for part in parts_told) == call.function.arguments
        assert chunks[-1].finish_reason == "length"
        tool: Any = {"type": "function", **TOOL["function"], "strict": None}
        name: Any = choice if isinstance(choice, str) else {"type": "function", "name": "add"}
        response = await client.responses.create(model="tiny", input="hi", tools=[tool], tool_choice=name)
        assert response.incomplete_details is not None
        assert [item.arguments for item in response.output] == [call.function.arguments]
        tools: Any = [{"name": "add", "input_schema": PARAMETERS}]
        of_anthropic = {"required": {"type": "any"}, "auto": {"type": "auto"}}
        form: Any = of_anthropic[choice] if isinstance(choice, str) else {"type": "tool", "name": "add"}
        message = await other.messages.create(model="tiny", messages=HI, max_tokens=99, tools=tools, tool_choice=form)
        assert message.stop_reason == "max_tokens"
        assert [(block.type, block.name) for block in message.content] == [("tool_use", "add")]


async def test_what_json_lacks_in_a_call_is_no_error(parts: EngineParts) -> None:
    written = '{"a": [NaN, -Infinity, 1e999, 2.5], "b": "x\\ud800"}'
    async with fronted(parts, CALL.replace('{"a": 1}', written)) as (front, _):
        opened(front)
        arguments = {"a": [None, None, None, 2.5], "b": "x?"}
        async with openai_client(front, "a-session") as client:
            chat = await client.chat.completions.create(model="m", messages=HI, tools=[TOOL])
            (told,) = chat.choices[0].message.tool_calls
            assert json.loads(told.function.arguments) == arguments
            messages = [*HI, chat.choices[0].message, {"role": "tool", "tool_call_id": told.id, "content": "4"}]
            await client.chat.completions.create(model="m", messages=messages, tools=[TOOL])
            tool: Any = {"type": "function", **TOOL["function"]}
            response = await client.responses.create(model="m", input="hi", tools=[tool])
            assert json.loads(response.output[0].arguments) == arguments
        async with anthropic_client(front, "a-session") as other:
            tools: Any = [{"name": "add", "input_schema": PARAMETERS}]
            message = await other.messages.create(model="m", messages=HI, max_tokens=200, tools=tools)
            assert message.content[-1].input == arguments
        calls = front.sessions.close("a-session")
        assert [len(sequence.calls) for sequence in training_sequences(calls)] == [2, 1, 1]


async def test_a_closed_session_and_a_client_that_leaves_drop_their_calls(parts: EngineParts) -> None:
    async with in_session(parts, "yes") as (front, loop, client):
        loop.hold = True
        waiting = asyncio.create_task(client.chat.completions.create(model="m", messages=HI))
        await until(lambda: len(loop.waiting) == 1)
        waiting.cancel()
        await until(lambda: not loop.waiting)
        waiting = asyncio.create_task(client.chat.completions.create(model="m", messages=HI, stream=False))
        await until(lambda: len(loop.waiting) == 1)
        assert front.sessions.close("a-session") == []
        with pytest.raises(openai.AuthenticationError, match="the session has ended"):
            await waiting
        await until(lambda: not loop.waiting)


# Refusals


@pytest.mark.parametrize(
    ("path", "change", "status", "why"),
    [
        ("chat/completions", {"web_search_options": {"a": 1}}, 400, "`web_search_options` is not supported here"),
        ("chat/completions", {"model": "other"}, 404, "there is no model other: this server has tiny"),
        ("chat/completions", {"max_tokens": 5000}, 400, "max_tokens"),
        ("completions", {"prompt": ["a"] * 65, "n": 2}, 400, "asks for 130 responses, more than 128"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 2000}]}, 400, "maximum context length"),
        ("chat/completions", {"structured_outputs": 0}, 400, "`structured_outputs` is 0, expected an object"),
        ("completions", {"echo": True}, 400, "`echo` is not supported here: the answer is the response alone"),
        ("completions", {"prompt_logprobs": 1}, 400, "`prompt_logprobs` is not supported here"),
        ("responses", {"background": True}, 400, "`background` is not supported here"),
        ("responses", {"input": [{"role": "assistant", "content": []}]}, 400, "`input[0].content` is empty"),
        ("chat/completions", {"messages": [*HI, DEEP_CALL]}, 400, "are nested too deeply to be read"),
        ("responses", {"tools": [{"type": "web_search"}]}, 400, "`tools[0].type` is 'web_search'"),
        ("messages", {"tools": [{"name": "a", "input_schema": {"type": "string"}}]}, 400, "has the type 'string'"),
        ("messages", {"mcp_servers": [{"url": "x"}]}, 400, "the server runs no tools"),
    ],
)
async def test_what_is_not_supported_is_refused_by_name(
    parts: EngineParts, path: str, change: dict[str, Any], status: int, why: str
) -> None:
    asks: dict[str, dict[str, Any]] = {
        "chat/completions": {"messages": HI},
        "completions": {"prompt": "ab"},
        "responses": {"input": "hi"},
        "messages": {"messages": HI, "max_tokens": 5},
    }
    async with fronted(parts, "yes") as (front, loop), ClientSession() as client:
        body = {"model": "tiny"} | asks.get(path, {}) | change
        answer = await client.post(f"{front.base_url}/v1/{path}", json=body, headers={"Authorization": f"Bearer {KEY}"})
        told = await answer.json()
    assert answer.status == status, told
    assert why in told["error"]["message"]
    assert (told.get("type") == "error") == (path == "messages")
    assert not loop.asked


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
    async with fronted(parts, "yes") as (front, loop), ClientSession() as client:
        session = opened(front, max_tokens=1024)  # as many as the engine takes
        fields = {"Authorization": "Bearer a-session"}
        url = f"{front.base_url}/v1"
        await client.post(f"{url}/chat/completions", json={"model": "m", "messages": HI}, headers=fields)
        answer = await client.post(f"{url}/{path}", json={"model": "m", **body}, headers=fields)
        assert answer.status == 400
        assert "With its response it may have 1024 tokens (max_tokens)" in (await answer.json())["error"]["message"]
        assert (session.exceeded, session.is_over.is_set(), len(loop.asked)) == ("max_tokens", True, 1)


async def test_a_response_has_the_room_behind_its_prompt(parts: EngineParts) -> None:
    async with in_session(parts, "yes", max_tokens=1024) as (_, loop, client):
        await client.completions.create(model="m", prompt="x" * 1015, max_tokens=16)
        await client.completions.create(model="m", prompt="x" * 9, max_tokens=16)
        await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x" * 1012}])
    assert [asked.params.max_tokens for asked in loop.asked] == [9, 16, 9]


CUSTOM = {"id": "c", "type": "custom", "custom": {"name": "add", "input": "x"}}


@pytest.mark.parametrize(
    ("path", "body", "why"),
    [
        ("chat/completions", {"messages": HI, "max_tokens": 0}, "`max_tokens` is 0, expected at least 1"),
        ("chat/completions", {"messages": HI, "max_completion_tokens": -1}, "`max_completion_tokens` is -1, expected"),
        ("responses", {"input": "hi", "max_output_tokens": 0}, "`max_output_tokens` is 0, expected at least 1"),
        ("messages", {"messages": HI}, "body.max_tokens"),
        ("chat/completions", {"messages": [*HI, {"role": "assistant", "tool_calls": [CUSTOM]}]}, "type 'function'"),
    ],
)
async def test_what_a_session_may_not_ask_is_refused(
    parts: EngineParts, path: str, body: dict[str, Any], why: str
) -> None:
    async with fronted(parts, "yes") as (front, loop), ClientSession() as client:
        opened(front)
        fields = {"Authorization": "Bearer a-session"}
        answer = await client.post(f"{front.base_url}/v1/{path}", json={"model": "m", **body}, headers=fields)
        told = await answer.json()
        assert (answer.status, told["error"]["type"]) == (400, "invalid_request_error")
        assert why in told["error"]["message"]
        assert (told.get("type") == "error") == (path == "messages")
        assert not loop.asked


async def test_tools_of_a_model_without_a_parser_are_refused(parts: EngineParts) -> None:
    plain = TEMPLATE.replace("<tool_call>", "").replace("</tool_call>", "")
    tools: Any = [{"name": "add", "input_schema": PARAMETERS}]
    async with (
        fronted(parts, "yes", template=plain) as (front, _),
        openai_client(front) as client,
        anthropic_client(front) as other,
    ):
        with pytest.raises(openai.BadRequestError, match=r"--chat-template FILE.*data\.chat_template"):
            await client.chat.completions.create(model="tiny", messages=HI, tools=[TOOL])
        told = await client.chat.completions.create(model="tiny", messages=HI, tools=[TOOL], tool_choice="none")
        assert told.choices[0].message.content == "yes"
        with pytest.raises(anthropic.BadRequestError, match=r"--chat-template FILE.*data\.chat_template"):
            await other.messages.create(model="tiny", max_tokens=9, messages=HI, tools=tools)
        message = await other.messages.create(
            model="tiny", max_tokens=9, messages=HI, tools=tools, tool_choice={"type": "none"}
        )
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
    async with fronted(parts, "yes") as (front, _):
        count = await asyncio.wait_for(sent(front, [begin, *[more] * 10_000]), 30.0)
        assert count < 10_000 or not more
        assert await said(front) == "yes"


async def test_a_connection_in_use_stays_open(parts: EngineParts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_front, "IDLE_CONNECTION_S", 2.0)
    async with fronted(parts, "yes") as (front, _), ClientSession() as client:
        used = set()
        for _ in range(8):
            body, fields = {"model": "tiny", "messages": HI}, {"Authorization": f"Bearer {KEY}"}
            async with client.post(f"{front.base_url}/v1/chat/completions", json=body, headers=fields) as answer:
                assert answer.status == 200
            used |= set(front._server.server_state.connections)
            await asyncio.sleep(0.4)
        assert len(used) == 1


async def test_a_reader_that_stops_ends_with_its_session(parts: EngineParts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_front, "IDLE_CONNECTION_S", 1.0)
    async with fronted(parts, "yes") as (front, loop):
        front.sessions.open("s", Sampling(max_new_tokens=9), SessionLimits(max_calls=3, max_tokens=900, seed=0))
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


async def said(front: Front) -> str:
    answer = await openai_client(front).chat.completions.create(model="tiny", messages=HI)
    return str(answer.choices[0].message.content)

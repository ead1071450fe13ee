"""The front builds every parser of vLLM for tool calls and reasoning, and chooses parsers by the model."""

from __future__ import annotations

import itertools
import os
from types import SimpleNamespace
from typing import Any

import pytest

from actors.rollout.vllm_engine import RolloutSpec, engine_environment
from actors.serving.parsers import parsers_of, refuse_unknown
from rlhf.agents.limits import SessionLimits
from rlhf.errors import RunError, UserError
from rlhf.models.files.tiny import byte_tokenizer
from rlhf.models.support import support_by_type
from rlhf.types import Sampling

os.environ |= engine_environment(RolloutSpec(model="", dtype="float32", max_model_len=8, transport=None))
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager

from actors.serving.captured_sessions import CURRENT_CALL, CapturedSession, ServedCall
from actors.serving.front import FrontSpec, _renderer
from actors.serving.parsers import _BY_TYPE, _REASONING_BY_MARKS, _TOOLS_BY_MARKS

TOOLS, REASONING = ToolParserManager.list_registered(), ReasoningParserManager.list_registered()
TOKENS = (  # a parser looks these tokens up when it is built
    *("<think>", "</think>", "<mm:think>", "</mm:think>", "<ifm|think>", "</ifm|think>", "[THINK]", "[/THINK]"),
    *("<tool_call>", "</tool_call>", "<tool_calls>", "</tool_calls>", "<tool_sep>", "[TOOL_CALLS]", "[ARGS]"),
    *(f"<\uff5ctool▁{name}\uff5c>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end")),
    *("<|tool_call_start|>", "<|tool_call_end|>", "<|python_tag|>", "<assistant>", "Ġ</", "</", "think", ">"),
)
GPT_OSS = "reads only gpt-oss"
MELODY = "requires the `cohere_melody` package"
REFUSED = {
    "openai": GPT_OSS,
    "openai_gptoss": GPT_OSS,
    "cohere_command3": MELODY,
    "cohere_command4": MELODY,
    "hf": "requires `response_template` metadata",
}
# Other names of chosen parsers, and parsers of models without a mark of their own or newer than transformers.
BY_NAME_ALONE = {
    *("hf", "llama4_json", "pythonic", "qwen3_json", "qwen3_xml", "xlam"),
    *("deepseek_v41", "granite_thinking_parser", "holo2", "inkling", "k2_horizon"),
    *("kimi_k3", "ling3", "minicpm5", "minicpmv", "minimax_m2_append_think", "minimax_m3", "muse_glimmer"),
    *("plamo3", "step3p5"),
}


def built(tools: str | None, reasoning: str | None, *, model_type: str = "llama", added: tuple[str, ...] = ()) -> Any:
    """Return the front's renderer, with a tokenizer of the given tokens."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(list(added))
    model = SimpleNamespace(model="tiny", hf_config=SimpleNamespace(model_type=model_type))
    engine: Any = SimpleNamespace(model_config=model, renderer=SimpleNamespace(tokenizer=tokenizer), model_ends=())
    return _renderer(engine, FrontSpec(name="tiny", own_key="key"), tools, reasoning)


@pytest.mark.parametrize(("name", "kind"), [(n, "tools") for n in TOOLS] + [(n, "reasoning") for n in REASONING])
def test_each_parser_of_vllm_is_built_or_refused_with_its_reason(name: str, kind: str) -> None:
    names = {"tools": None, "reasoning": None} | {kind: name}
    if name in REFUSED:
        with pytest.raises(RunError, match=f"{name}.*{REFUSED[name]}"):
            built(**names, added=TOKENS)
        return
    parser = built(**names, added=TOKENS).parser
    assert [parser.tool_parser_cls, parser.reasoning_parser_cls][kind == "reasoning"] is not None


# Grammars of a session: only what the client itself asks for restricts the policy.

PARAMETERS = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
FUNCTION = {"name": "f", "description": "d", "parameters": PARAMETERS}
OBJECT = {"type": "json_schema", "json_schema": {"name": "n", "schema": PARAMETERS}}
CHAT_ALONE = {"hy_v4"}  # vLLM's parser does not read tools as the Responses API writes them
TEXT_OBJECT = {"format": {"type": "json_schema", "name": "n", "schema": PARAMETERS}}
CHOSEN = sorted(
    {*_BY_TYPE.values()}
    | {(tools, None) for _, tools in _TOOLS_BY_MARKS}
    | {("hermes", reasoning) for _, reasoning in _REASONING_BY_MARKS},
    key=str,
)


async def sampled_under(renderer: Any, request: Any) -> tuple[Any, str | None]:
    """Return the grammar for sampling a session's request, and the reason for the grammar."""
    limits = SessionLimits(max_calls=9, max_tokens=99, seed=1)
    call = ServedCall(CapturedSession(Sampling(max_new_tokens=9), limits, ""), "")
    CURRENT_CALL.set(call)
    request.kv_transfer_params = {"prompt_token_ids": [1]}  # so that vLLM renders nothing
    tools = [{"type": "function", "function": FUNCTION}]
    await renderer.preprocess_chat(request, [{"role": "user"}], None, "auto", None, tools, renderer.parser)
    params = request.to_sampling_params(9, {})
    return params.structured_outputs, call.restriction


def chat(**fields: Any) -> Any:
    asked = {"messages": [], "tools": [{"type": "function", "function": FUNCTION}], **fields}
    return ChatCompletionRequest.model_validate(asked)


def responses(**fields: Any) -> Any:
    return ResponsesRequest.model_validate({"input": "", "tools": [{"type": "function", **FUNCTION}], **fields})


@pytest.mark.parametrize(("tools", "reasoning"), [pair for pair in CHOSEN if pair[0] and not {*pair} & REFUSED.keys()])
async def test_a_session_is_sampled_under_the_grammar_that_its_client_asks_for(
    tools: str, reasoning: str | None
) -> None:
    renderer = built(tools, reasoning, added=TOKENS)
    renderer.renderer.get_tokenizer = lambda: renderer.renderer.tokenizer
    renderer.renderer.validate_token_ids = lambda ids, parameter: None
    renderer.model_config = SimpleNamespace(
        multimodal_config=None, enable_prompt_embeds=False, max_model_len=99, architecture="Cohere2ForCausalLM"
    )
    makers = (chat,) if tools in CHAT_ALONE else (chat, responses)
    for make, streams in itertools.product(makers, (False, True)):
        for free in ({}, {"tool_choice": "auto"}, {"tool_choice": "none"}, {"parallel_tool_calls": False}):
            assert await sampled_under(renderer, make(stream=streams, **free)) == (None, None)
    wishes = [
        (chat, {"response_format": OBJECT}, "response_format"),
        (chat, {"structured_outputs": {"regex": "a+"}}, "structured_outputs"),
        (chat, {"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        (responses, {"text": TEXT_OBJECT}, "response_format"),
        (responses, {"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        *((make, {"tool_choice": "required"}, "tool_choice") for make in makers),
    ]
    for make, wish, by in wishes:
        if make in makers:
            vllms = make(**wish)
            parser = renderer.parser(renderer.renderer.tokenizer, vllms.tools, model_config=renderer.model_config)
            has_grammar = parser.adjust_request(vllms).to_sampling_params(9, {}).structured_outputs is not None
            grammar, restriction = await sampled_under(renderer, make(**wish))
            assert (grammar is not None, restriction) == (has_grammar, by)
            assert has_grammar or by == "tool_choice"  # some models write any call


def test_a_parser_that_does_not_fit_is_refused() -> None:
    assert built("openai", "openai_gptoss", model_type="gpt_oss").parser.__name__ == "HarmonyParser"
    with pytest.raises(RunError, match=r"llama3_json.*could not locate the bot token.*Name other parsers"):
        built("llama3_json", None)
    with pytest.raises(UserError, match="--tool-parser: is hermess, and vLLM has no such parser"):
        refuse_unknown("hermess", None)
    refuse_unknown("hermes", "qwen3")


def test_every_parser_of_vllm_is_chosen_for_some_model() -> None:
    chosen = {name for pair in _BY_TYPE.values() for name in pair if name}
    chosen |= {name for _, name in (*_TOOLS_BY_MARKS, *_REASONING_BY_MARKS)}
    assert chosen <= {*TOOLS, *REASONING}
    assert {*TOOLS, *REASONING} - chosen == BY_NAME_ALONE


def test_parsers_are_chosen_by_the_type_and_by_the_template() -> None:
    assert parsers_of("{{ x }}", "llama") == (None, None)
    assert parsers_of("<tool_call> <think> enable_thinking", "qwen3") == ("hermes", "qwen3")
    assert parsers_of("tool▁calls▁begin ```json", "deepseek_v3") == ("deepseek_v3", "deepseek_v3")
    assert parsers_of("tool▁calls▁begin", "deepseek_v3") == ("deepseek_v31", "deepseek_v3")
    assert parsers_of("<|tool_calls_section_begin|> <think>", "kimi_k2") == ("kimi_k2", "kimi_k2")
    assert parsers_of("<think>", "lfm2_moe") == ("lfm2", "deepseek_r1")


def test_a_type_of_the_table_whose_name_vllm_knows_has_its_parser() -> None:
    template = "<think> enable_thinking [TOOL_CALLS]"  # the marks of Qwen3 and Mistral
    for model_type in support_by_type():
        family = model_type.removesuffix("_text").removesuffix("_moe")
        same = {name for name in (*TOOLS, *REASONING) if name in (model_type, family)}
        assert not same or same & {*parsers_of(template, model_type)}, model_type

"""vLLM's parsers of tool calls and reasoning: the front builds each, and chooses them by the model."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from actors.rollout.vllm_engine import RolloutSpec, engine_environment
from actors.serving.parsers import parsers_of, refuse_unknown
from rlhf.errors import RunError, UserError
from rlhf.models.support import support_by_type
from rlhf.models.tiny import byte_tokenizer

os.environ |= engine_environment(RolloutSpec(model="", dtype="float32", max_model_len=8, transport=None))
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager

from actors.serving.front import FrontSpec, _renderer
from actors.serving.parsers import _BY_TYPE, _REASONING_BY_MARKS, _TOOLS_BY_MARKS

TOOLS, REASONING = ToolParserManager.list_registered(), ReasoningParserManager.list_registered()
TOKENS = (  # looked up by some parser as it is built
    *("<think>", "</think>", "<mm:think>", "</mm:think>", "<ifm|think>", "</ifm|think>", "[THINK]", "[/THINK]"),
    *("<tool_call>", "</tool_call>", "<tool_calls>", "</tool_calls>", "<tool_sep>", "[TOOL_CALLS]", "[ARGS]"),
    *(f"<\uff5ctool▁{name}\uff5c>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end")),
    *("<|tool_call_start|>", "<|tool_call_end|>", "<|python_tag|>", "<assistant>", "Ġ</", "</", "think", ">"),
)
GPT_OSS = "reads gpt-oss alone"
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
    """The front's renderer, with a tokenizer that has these tokens."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(list(added))
    model = SimpleNamespace(model="tiny", hf_config=SimpleNamespace(model_type=model_type))
    engine: Any = SimpleNamespace(model_config=model, renderer=SimpleNamespace(tokenizer=tokenizer))
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


def test_gpt_oss_has_its_parsers() -> None:
    assert built("openai", "openai_gptoss", model_type="gpt_oss").parser.__name__ == "HarmonyParser"


def test_a_parser_whose_tokens_the_tokenizer_lacks_is_refused() -> None:
    with pytest.raises(RunError, match=r"llama3_json.*could not locate the bot token.*Name others"):
        built("llama3_json", None)


def test_every_parser_of_vllm_is_chosen_for_some_model() -> None:
    chosen = {name for pair in _BY_TYPE.values() for name in pair if name}
    chosen |= {name for _, name in (*_TOOLS_BY_MARKS, *_REASONING_BY_MARKS)}
    assert chosen <= {*TOOLS, *REASONING}
    assert {*TOOLS, *REASONING} - chosen == BY_NAME_ALONE


def test_parsers_are_chosen_by_the_type_and_by_the_template() -> None:
    assert parsers_of("{{ x }}", "llama") == (None, None)
    assert parsers_of("<tool_call> <think> enable_thinking", "qwen3") == ("hermes", "qwen3")
    assert parsers_of("<tool_call>\n<function=", "qwen3_moe") == ("qwen3_coder", None)
    assert parsers_of("[TOOL_CALLS]", "mistral") == ("mistral", None)
    assert parsers_of("tool▁calls▁begin ```json", "deepseek_v3") == ("deepseek_v3", "deepseek_v3")
    assert parsers_of("tool▁calls▁begin", "deepseek_v3") == ("deepseek_v31", "deepseek_v3")
    assert parsers_of("<|tool_calls_section_begin|>", "kimi_k2") == ("kimi_k2", None)
    assert parsers_of("<|tool_calls_section_begin|> <think>", "kimi_k2") == ("kimi_k2", "kimi_k2")
    assert parsers_of("<think>", "lfm2_moe") == ("lfm2", "deepseek_r1")


def test_a_type_of_the_table_whose_name_vllm_knows_has_its_parser() -> None:
    template = "<think> enable_thinking [TOOL_CALLS]"  # the marks of Qwen3 and Mistral
    for model_type in support_by_type():
        family = model_type.removesuffix("_text").removesuffix("_moe")
        same = {name for name in (*TOOLS, *REASONING) if name in (model_type, family)}
        assert not same or same & {*parsers_of(template, model_type)}, model_type


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match="--tool-parser: is hermess, and vLLM has no such parser"):
        refuse_unknown("hermess", None)
    refuse_unknown("hermes", "qwen3")

"""Choose vLLM's parsers of tool calls and of reasoning by the model: by the type, or by marks in the chat template."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf.errors import RunError, UserError

# vLLM's names of the parsers of (tool calls, reasoning) for model types with a format of their own. None: by marks.
_BY_TYPE: Mapping[str, tuple[str | None, str | None]] = {
    "apertus": ("apertus", None),
    "cohere2": ("cohere_command3", "cohere_command3"),
    "cohere2_moe": ("cohere_command4", "cohere_command4"),
    "deepseek_v3": (None, "deepseek_v3"),
    "deepseek_v32": ("deepseek_v32", "deepseek_v3"),
    "deepseek_v4": ("deepseek_v4", "deepseek_v4"),
    "ernie4_5_moe": ("ernie45", "ernie45"),
    "gemma4": ("gemma4", "gemma4"),
    "gemma4_text": ("gemma4", "gemma4"),
    "glm4_moe": ("glm45", "glm45"),
    "glm4_moe_lite": ("glm47", "glm47"),
    "glm_moe_dsa": ("glm47", "glm47"),
    "gpt_oss": ("openai", "openai_gptoss"),
    "granite": ("granite", "granite"),
    "granitemoe": ("granite", "granite"),
    "granitemoehybrid": ("granite4", None),
    "hunyuan_v1_dense": ("hunyuan_a13b", None),  # the reasoning parser knows only the tokens of the mixture
    "hunyuan_v1_moe": ("hunyuan_a13b", "hunyuan_a13b"),
    "hy_v3": ("hy_v3", "hy_v3"),
    "hy_v4": ("hy_v4", "hy_v4"),
    "internlm2": ("internlm", None),
    "jamba": ("jamba", None),
    "kimi_k2": ("kimi_k2", None),
    "kimi_linear": ("kimi_k2", None),
    "laguna": ("poolside_v1", "poolside_v1"),
    "lfm2": ("lfm2", None),
    "lfm2_moe": ("lfm2", None),
    "llama4": ("llama4_pythonic", None),
    "llama4_text": ("llama4_pythonic", None),
    "longcat_flash": ("longcat", None),
    "mimo": ("mimo", "mimo"),
    "mimo_v2_flash": ("mimo", "mimo"),
    "minimax_m2": ("minimax_m2", "minimax_m2"),
    "nemotron_h": (None, "nemotron_v3"),
    "olmo3": ("olmo3", "olmo3"),
    "seed_oss": ("seed_oss", "seed_oss"),
    "step3": ("step3", "step3"),
}
# All marks of a row are in the template. The first such row counts.
_TOOLS_BY_MARKS = (
    (("tool▁calls▁begin", "```json"), "deepseek_v3"),
    (("tool▁calls▁begin",), "deepseek_v31"),
    (("<dots_function_call>",), "dots"),
    (("<function_calls>",), "olmo3"),
    (("<function=", "<tool_call>"), "qwen3_coder"),
    (("<tool_call>",), "hermes"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<start_function_call>",), "functiongemma"),
    (("<function_call>",), "granite-20b-fc"),
    (("function call<|role_sep|>",), "gigachat3"),
    (("<|/tool|>",), "phi4_mini_json"),
    (("<|python_tag|>",), "llama3_json"),
    (('{"name": function name, "parameters":',), "llama3_json"),
)
_REASONING_BY_MARKS = (
    (("<think>", "<|tool_calls_section_begin|>"), "kimi_k2"),
    (("<think>", "enable_thinking"), "qwen3"),
    (("[THINK]",), "mistral"),
    (("<think>",), "deepseek_r1"),
)


def parsers_of(template: str, model_type: str) -> tuple[str | None, str | None]:
    """Return vLLM's names of the parsers of tool calls and of reasoning. None: the model is not known to write any."""
    tools, reasoning = _BY_TYPE.get(model_type, (None, None))
    return tools or _first(_TOOLS_BY_MARKS, template), reasoning or _first(_REASONING_BY_MARKS, template)


def refuse_stubs(tool_parser: str | None, reasoning_parser: str | None, model_type: str) -> None:
    """Raise RunError if a parser of gpt-oss is set for another model: vLLM would then fail at each request."""
    stubs = {tool_parser, reasoning_parser} & {*_BY_TYPE["gpt_oss"]}
    if stubs and model_type != "gpt_oss":
        raise RunError(
            f"vLLM's parser {' and '.join(sorted(map(str, stubs)))} reads only gpt-oss. Name another parser."
        )


def refuse_unknown(tool_parser: str | None, reasoning_parser: str | None) -> None:
    """Raise UserError if vLLM has no parser of such a name."""
    if tool_parser is None and reasoning_parser is None:
        return
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    for flag, name, registry in (
        ("--tool-parser", tool_parser, ToolParserManager),
        ("--reasoning-parser", reasoning_parser, ReasoningParserManager),
    ):
        names = registry.list_registered()
        if name is not None and name not in names:
            raise UserError(f"{flag}: is {name}, and vLLM has no such parser. Choose one of {', '.join(names)}.")


def _first(rows: tuple[tuple[tuple[str, ...], str], ...], template: str) -> str | None:
    return next((name for marks, name in rows if all(mark in template for mark in marks)), None)

"""Refuse requests over HTTP in the form of OpenAI's or Anthropic's errors, and name the unsupported field."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

ANTHROPIC_PATH, RESPONSES_PATH = "/v1/messages", "/v1/responses"
DRAWING = ("/v1/chat/completions", "/v1/completions", RESPONSES_PATH, ANTHROPIC_PATH)  # their answers are sampled
_METHODS = {"/v1/models": "GET", **dict.fromkeys((*DRAWING, f"{ANTHROPIC_PATH}/count_tokens"), "POST")}
THERE_IS = f"there are {', '.join(f'{method} {path}' for path, method in _METHODS.items())} and GET /health"

# Fields of vLLM's requests that do not go with an engine in this process, or that another machine must not set.
_NOT_HERE: Mapping[str, str] = {
    "kv_transfer_params": "the server makes the prompt's tokens itself",
    "ec_transfer_params": "the server has one engine",
    "use_beam_search": "beam search does not sample from the model",
    "prompt_embeds": "a prompt is text or tokens",
    "truncate_prompt_tokens": "a prompt that is too long is refused",
    "background": "a request is answered at once",
    "previous_input_messages": "send the whole conversation in `input`",
    "cache_salt": "the engine sets it",
    "priority": "requests are answered in the order of their arrival",
    "mm_payload": "send images as image_url",
    "mm_processor_kwargs": "the model's processor decides how images are resized",
    "media_io_kwargs": "images have one decoder",
    "vllm_xargs": "they are vLLM's own",
    "chat_template": "the server sets it (rlhf serve --chat-template FILE)",
    "watermarking": "the tokens are the model's",
    "mcp_servers": "the server runs no tools",
    "container": "the server runs no tools",
    "echo": "the answer is only the response",
    "logprob_token_ids": "ask for top_logprobs",
    "prompt_logprobs": "a session returns log-probabilities of responses",
}
# Fields that clients send and that change no answer.
_NO_EFFECT = {
    *("cache_control", "metadata", "prediction", "prompt_cache_key", "prompt_cache_retention"),
    *("safety_identifier", "service_tier", "store", "user"),
}
_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC_KINDS = {**_KINDS, 413: "request_too_large", 504: "timeout_error"}


class RefusedCall(ValueError):
    """A refused request, with the fields of an error."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.param = param  # the field
        self.code = code
        self.status = status

    def body(self, path: str) -> dict[str, Any]:
        """Return the error in the form of the path's protocol."""
        is_fault = self.status >= 500
        if path.startswith(ANTHROPIC_PATH):
            kind = _ANTHROPIC_KINDS.get(self.status, "api_error" if is_fault else "invalid_request_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        kind = _KINDS.get(self.status, "server_error" if is_fault else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refuse_route(method: str, path: str) -> None:
    """Raise RefusedCall if the front has no such path, or not with this method."""
    if path not in _METHODS:
        raise RefusedCall(f"there is no {path}: {THERE_IS}", status=404)
    if method != _METHODS[path]:
        raise RefusedCall(f"{path} is not for {method}: {THERE_IS}", status=405)


def refuse_unsupported(
    body: Mapping[str, Any], known: Collection[str], *, has_tool_parser: bool, in_session: bool
) -> None:
    """Raise RefusedCall for an unsupported field, unless the field has no effect. `known`: fields of vLLM's request."""
    if body.get("previous_response_id"):
        why = "responses are not stored here: send the whole conversation in `input`"
        raise RefusedCall(f"`previous_response_id` is not supported: {why}", param="previous_response_id", status=404)
    for name, value in body.items():
        if name in _NO_EFFECT or not value:
            continue
        if name == "prompt_logprobs" and not in_session:
            continue
        if name in _NOT_HERE:
            raise RefusedCall(f"`{name}` is not supported here: {_NOT_HERE[name]}", param=name)
        if name not in known:
            there_are = ", ".join(sorted({*known} - _NOT_HERE.keys()))
            raise RefusedCall(f"`{name}` is not supported here; there are {there_are}", param=name)
    if not isinstance(structure := body.get("structured_outputs"), dict | None):
        message = f"`structured_outputs` is {structure!r:.60}, expected an object"
        raise RefusedCall(message, param="structured_outputs")
    tools, choice = body.get("tools"), body.get("tool_choice")
    for index, tool in enumerate(tools if isinstance(tools, list) else ()):
        kind = tool.get("type", "function") if isinstance(tool, dict) else None
        if kind not in ("function", "custom"):
            raise RefusedCall(f"`tools[{index}].type` is {kind!r:.60}: the server runs no tools", param="tools")
        if (form := _form_of_arguments(tool)) != "object":
            why = "the arguments of a call are an object"
            raise RefusedCall(f"the schema of `tools[{index}]` has the type {form!r:.60}: {why}", param="tools")
    if isinstance(choice, dict):  # as Anthropic writes it
        choice = choice.get("type")
    if tools and not has_tool_parser and choice != "none":
        why = (
            "it is not known how this model writes tool calls. Start the server with a chat template that shows tool "
            "calls (--chat-template FILE) or with a tool parser (--tool-parser), or give the run such a template "
            "(data.chat_template)"
        )
        raise RefusedCall(f"`tools` is not supported here: {why}", param="tools")


def _form_of_arguments(tool: Mapping[str, Any]) -> Any:
    """Return the type named in the schema of a tool's arguments, in the form of any protocol."""
    function = tool.get("function", tool)
    named = function if isinstance(function, dict) else {}
    schema = named.get("parameters", named.get("input_schema"))
    return schema.get("type", "object") if isinstance(schema, dict) else "object"

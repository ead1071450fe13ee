"""The HTTP front of one engine: chat completions, completions, responses and Anthropic's messages.

vLLM's own protocol and serving code answers, over the engine loop of this process. `rlhf serve` uses the front, and so
do agents in training. Agents' calls are captured by session.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from actors.rollout.engine_calls import EngineCalls
from actors.rollout.image_inputs import ImageInputs
from actors.rollout.vllm_engine import added_tokens, end_tokens
from actors.serving.captured_sessions import CURRENT_CALL, CapturedSessions
from actors.serving.front_engine import EngineParts, FrontEngine
from actors.serving.gateway import Gateway
from actors.serving.parsers import parsers_of, refuse_stubs
from actors.serving.refusals import ANTHROPIC_PATH, DRAWING
from rlhf.errors import RunError
from rlhf.serving import CLOSE_EVERY_S, IDLE_CONNECTION_S

logger = logging.getLogger(__name__)

END_WITHIN_S = 5.0
START_WITHIN_S = 30.0
MAX_HEAD_BYTES = 1 << 18  # asyncio may read as much at once
KEEP_ALIVE_S = 15  # between two comments in a stream without an event


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontSpec:
    """The settings of a front."""

    name: str  # of the model, in answers
    template: str | None = None  # the chat template; None: the tokenizer's
    turn_ends: tuple[int, ...] = ()  # tokens that end a turn of a conversation, besides the model's end token
    tool_parser: str | None = None  # vLLM's name; None: chosen by the model
    reasoning_parser: str | None = None  # the same
    own_key: str | None = None  # of calls with the client's settings, which are not captured; None: no such calls


class Front:
    """A running front. `sessions` opens and closes sessions."""

    def __init__(self, server: Any, listener: socket.socket, app: Gateway) -> None:
        self.sessions = app.sessions
        self._app = app
        host, port = listener.getsockname()[:2]
        self.base_url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._server = server
        self._serving = asyncio.create_task(server.serve(sockets=[listener]))
        self._closing = asyncio.create_task(close_idle(server.server_state.connections))

    @classmethod
    async def open(
        cls,
        calls: EngineCalls,
        spec: FrontSpec,
        *,
        lora: Callable[[], Any],
        host: str,
        images: ImageInputs | None = None,
    ) -> Front:
        """Start the front of a started engine, at a free port of `host`. images: None: requests are only text."""
        parts = await calls.run(engine_parts, "the parts of its front")
        engine = FrontEngine(calls.loop, parts, ends=spec.turn_ends, lora=lora)
        sessions = CapturedSessions(lambda prefix: calls.loop.abort([prefix]), takes_images=images is not None)
        return await cls.serve(await build_front(engine, sessions, spec, images), host=host)

    @classmethod
    async def serve(cls, app: Gateway, *, host: str) -> Front:
        """Serve an application at a free port of `host`."""
        import uvicorn

        class Server(uvicorn.Server):
            @contextmanager
            def capture_signals(self) -> Iterator[None]:
                """Leave the signals of the process to the process's owner."""
                yield

        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # With the protocol named, asyncio sends small packets at once. Otherwise a call takes 40 ms more.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.bind((host, 0))
        config = uvicorn.Config(
            app,
            http=bounded_protocol(),
            timeout_keep_alive=int(IDLE_CONNECTION_S),  # longer than clients keep one: they would lose a call
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
        )
        front = cls(Server(config), listener, app)
        async with asyncio.timeout(START_WITHIN_S):
            while not front._server.started:
                await asyncio.sleep(0.01)
        return front

    def admit(self, key: str, name: str) -> None:
        """Let calls with a key through, which are not captured. `name`: of the model in these calls."""
        self._app.own_key, self._app.name = key, name

    async def close(self) -> None:
        """Stop answering. Requests in flight are dropped after END_WITHIN_S."""
        self._closing.cancel()
        self._server.should_exit = True
        done, _ = await asyncio.wait([self._serving], timeout=END_WITHIN_S)
        if not done:
            self._server.force_exit = True
            await asyncio.wait([self._serving], timeout=END_WITHIN_S)


def bounded_protocol() -> type[asyncio.Protocol]:
    """Return uvicorn's protocol with a limit on the bytes that a client sends in a head, or after a refused body."""
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    class Bounded(AutoHTTPProtocol):  # type: ignore[valid-type, misc]
        idle_since = 0.0
        unasked_bytes = 0

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self.idle_since = asyncio.get_running_loop().time()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self.idle_since = asyncio.get_running_loop().time()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.unasked_bytes = self.unasked_bytes + len(data) if is_idle(self) else 0
            if self.unasked_bytes > MAX_HEAD_BYTES:
                self.transport.abort()

    return Bounded


def is_idle(connection: Any) -> bool:
    """Return whether uvicorn answers no request of a connection, or waits for the reader after the answer's end."""
    return connection.cycle is None or connection.cycle.response_complete or connection.transport.is_closing()


async def close_idle(connections: Collection[Any]) -> None:
    """Close connections that wait too long for a complete head, and the oldest connections if there are too many."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
    while True:
        await asyncio.sleep(CLOSE_EVERY_S)
        excess, now = len(connections) - most, asyncio.get_running_loop().time()
        for connection in sorted(filter(is_idle, connections), key=lambda one: float(one.idle_since)):
            if excess <= 0 and now - connection.idle_since < IDLE_CONNECTION_S:
                break
            if connection.transport.is_closing():
                connection.transport.abort()  # the client has stopped reading
            connection.transport.close()
            excess -= 1


def engine_parts(engine: Any) -> EngineParts:
    return EngineParts(
        vllm_config=engine.vllm_config,
        renderer=engine.renderer,
        input_processor=engine.input_processor,
        added=added_tokens(engine),
        ends=end_tokens(engine),
    )


async def build_front(
    engine: FrontEngine, sessions: CapturedSessions, spec: FrontSpec, images: ImageInputs | None = None
) -> Gateway:
    """Return vLLM's application around an engine, behind the gateway. RunError: a parser does not fit the model."""
    from fastapi import FastAPI
    from vllm.entrypoints.anthropic.api_router import attach_router as attach_messages
    from vllm.entrypoints.generate.api_router import init_generate_state
    from vllm.entrypoints.openai.chat_completion.api_router import attach_router as attach_chat
    from vllm.entrypoints.openai.completion.api_router import attach_router as attach_completions
    from vllm.entrypoints.openai.models.api_router import attach_router as attach_models
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.openai.responses.api_router import attach_router as attach_responses
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

    logging.getLogger("vllm.tool_parsers").setLevel(logging.CRITICAL)  # a malformed call is no error here
    model = engine.model_config
    template = spec.template or engine.renderer.get_tokenizer().chat_template
    by_model = parsers_of(str(template), model.hf_config.model_type)
    tool_parser, reasoning_parser = spec.tool_parser or by_model[0], spec.reasoning_parser or by_model[1]
    app = FastAPI(openapi_url=None)
    state = app.state
    state.args, state.engine_client, state.tool_server = _arguments(spec, tool_parser, reasoning_parser), engine, None
    state.openai_serving_models = OpenAIServingModels(engine, [BaseModelPath(name=spec.name, model_path=model.model)])
    renderer = state.online_renderer = _renderer(engine, spec, tool_parser, reasoning_parser)
    if images is not None:
        from actors.serving.request_images import RequestImages

        renderer.images = RequestImages(images)
    await init_generate_state(engine, state, state.args, None, ("generate",), {})
    _hear_answers(state)
    for attach in (attach_chat, attach_completions, attach_responses, attach_messages, attach_models):
        attach(app)
    init_exception_handler(app)
    return Gateway(
        app=app,
        sessions=sessions,
        fields=request_fields(),
        own_key=spec.own_key,
        name=spec.name,
        has_tool_parser=tool_parser is not None,
        check_item=lambda item: ResponsesRequest.model_validate({"model": spec.name, "input": [item]}),
    )


def _arguments(spec: FrontSpec, tool_parser: str | None, reasoning_parser: str | None) -> Any:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    flags = ["--enable-prompt-tokens-details", "--sse-keep-alive-interval", str(KEEP_ALIVE_S)]
    flags += ["--enable-auto-tool-choice", "--tool-call-parser", tool_parser] if tool_parser else []
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
    args.chat_template = spec.template
    args.structured_outputs_config.reasoning_parser = reasoning_parser or ""
    return args


def _renderer(engine: FrontEngine, spec: FrontSpec, tool_parser: str | None, reasoning_parser: str | None) -> Any:
    from actors.serving.front_renderer import SessionRenderer

    refuse_stubs(tool_parser, reasoning_parser, engine.model_config.hf_config.model_type)
    try:
        renderer = SessionRenderer(
            engine.model_config,
            engine.renderer,
            request_logger=None,
            chat_template=spec.template,
            chat_template_content_format="auto",
            enable_auto_tools=tool_parser is not None,
            tool_parser=tool_parser,
            reasoning_parser=reasoning_parser,
        )
        renderer.turn_ends, renderer.model_ends = spec.turn_ends, engine.model_ends
        return renderer
    except (ImportError, TypeError) as error:  # the first: vLLM's parser needs a package that is not installed
        raise RunError(
            f"the parser of tool calls, {tool_parser}, or of reasoning, {reasoning_parser}, does not fit the model: "
            f"{' '.join(str(error).split()).rstrip('.')}. Name other parsers."
        ) from error


def _hear_answers(state: Any) -> None:
    """Let vLLM's serving classes record what clients get, and use the protocol's sampling defaults.

    By default vLLM takes the sampling parameters of the model's generation_config.json.
    """
    from actors.serving.front_renderer import hearing
    from actors.vllm_patches.cut_calls import ending_as_sampled, with_whole_arguments

    chats = [state.openai_serving_chat, state.anthropic_serving_messages]
    if state.online_renderer.parser is not None:
        parser = hearing(state.online_renderer.parser)
        state.openai_serving_responses.parser = parser
        for chat in chats:
            chat.parser_cls = parser
            whole = chat.chat_completion_full_generator
            chat.chat_completion_full_generator = ending_as_sampled(whole, lambda: CURRENT_CALL.get().cut)
        messages = state.anthropic_serving_messages
        messages.messages_full_converter = with_whole_arguments(messages.messages_full_converter)
    for serving in [*chats, state.openai_serving_completion, state.openai_serving_responses]:
        serving.default_sampling_params = {}


def request_fields() -> Mapping[str, frozenset[str]]:
    """Return the names of the fields of vLLM's requests, by path."""
    from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    drawing = (ChatCompletionRequest, CompletionRequest, ResponsesRequest, AnthropicMessagesRequest)
    forms = {**dict(zip(DRAWING, drawing, strict=True)), f"{ANTHROPIC_PATH}/count_tokens": AnthropicCountTokensRequest}
    return {
        path: frozenset(name for key, value in form.model_fields.items() for name in (key, value.alias or key))
        for path, form in forms.items()
    }

"""`rlhf serve MODEL`: serve a model over HTTP through the interfaces of OpenAI and Anthropic."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, Literal

from rlhf.commands.command import Command
from rlhf.commands.shared import stoppable, write_stdout
from rlhf.errors import UserError

SERVE_PORT = 8702
USUAL_LENGTH = 8192  # tokens of prompt and response if the model allows more: the engine's cache has to hold them
MOST_ALTERNATIVES = 256  # log-probabilities of other tokens at a position, for students of this model
GRACE_S = 60.0  # added to a request's deadline for the engine's calls, so that the request's deadline is reported


@stoppable
def serve(
    model: str | PathLike[str],
    *,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    token_env: str | None = None,
    engines: int = 1,
    tensor_parallel: int = 1,
    kv_cache_gib: int | None = None,
    max_length: int | None = None,
    deadline_s: float = 600.0,
    chat_template: str | None = None,
    tool_parser: str | None = None,
    reasoning_parser: str | None = None,
    image_hosts: Sequence[str] = (),
    device: Literal["cpu", "cuda"] = "cpu",
    trust_remote_code: bool = False,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve a model over HTTP through the interfaces of OpenAI and Anthropic, until SIGINT or SIGTERM.

    `ready` is called with the base URL for clients. UserError before anything starts if the model, the token or a
    limit is wrong.

    Args:
        name (NAME): the model's name in requests; MODEL if not given.
        token_env (NAME): the environment variable with the token that callers must give as API key.
        engines (N): the number of engines for the requests.
        tensor_parallel (N): the number of GPUs of each engine.
        kv_cache_gib (N): the cache of each engine on a CPU, in GiB; 1 if not given.
        max_length (N): the maximum number of tokens in prompt and response; the model's, up to 8192, if not given.
        deadline_s (S): the maximum time from a request to its answer, in seconds.
        chat_template (FILE): a Jinja file in place of the model's chat template.
        tool_parser (NAME): vLLM's parser of the model's tool calls; chosen by the model if not given.
        reasoning_parser (NAME): vLLM's parser of the model's reasoning; chosen by the model if not given.
        image_hosts (HOST): a host from which the server fetches images of requests by https; none if not given, so that
            requests hold their images.
    """
    from actors.serving.http import ServerSpec, serve_model
    from actors.serving.offline import load_servable
    from actors.serving.parsers import refuse_unknown
    from rlhf.config.schema.cluster import ClusterConfig
    from rlhf.data.templates import ChatTemplate, read_template
    from rlhf.serving import refuse_taken, serving_token
    from rlhf.tracking import logs

    logs.configure()
    least = {
        "--engines": (engines, 1),
        "--tensor-parallel": (tensor_parallel, 1),
        "--kv-cache-gib": (kv_cache_gib, 1),
        "--max-length": (max_length, 2),
    }
    for flag, (value, lowest) in least.items():
        if value is not None and value < lowest:
            raise UserError(f"{flag}: is {value}, expected {lowest} or more")
    for host_name in image_hosts:
        if not all(part.replace("-", "").isalnum() for part in host_name.split(".")):
            raise UserError(f"--image-hosts: {host_name!r:.60} is no name of a host, such as images.example.com")
    if not 0.0 < deadline_s <= 900_000.0:
        raise UserError(f"--deadline-s: is {deadline_s:g}, expected more than 0, up to 900000")
    if kv_cache_gib is not None and device == "cuda":
        raise UserError("--kv-cache-gib: has no effect on a GPU, where the cache takes the remaining memory. Remove it")
    if tensor_parallel > 1 and device == "cpu":
        raise UserError("--tensor-parallel: distributes a model over GPUs. Give --device cuda, or remove it")
    token = serving_token(host, token_env)
    refuse_taken(host, port)
    refuse_unknown(tool_parser, reasoning_parser)
    text = None if chat_template is None else read_template(chat_template, key="--chat-template")
    template = ChatTemplate(text=text)
    served, tokenizer = load_servable(str(model), trust_remote_code=trust_remote_code, device=device, template=template)
    if max_length is not None and served.max_length is not None and max_length > served.max_length:
        raise UserError(f"--max-length: is {max_length}, more than the {served.max_length} tokens of {served.name}")
    length = max_length or min(served.max_length or USUAL_LENGTH, USUAL_LENGTH)
    rollout: dict[str, Any] = {"engines": engines, "tensor_parallel": tensor_parallel}
    rollout["engine_args"] = {"max_logprobs": MOST_ALTERNATIVES}
    if kv_cache_gib is not None:
        rollout["kv_cache_gib"] = kv_cache_gib
    cluster = {"device": device, "roles": {"rollout": rollout}, "call_timeout_s": deadline_s + GRACE_S}
    spec = ServerSpec(
        name=name or served.name,
        max_length=length,
        deadline_s=deadline_s,
        token=token,
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
        image_hosts=tuple(image_hosts),
    )
    serve_model(served, tokenizer, spec, ClusterConfig.model_validate(cluster), host=host, port=port, ready=ready)


def _present(args: argparse.Namespace) -> None:
    COMMAND.call(args, ready=lambda url: write_stdout(f"serving {url}\n"))


COMMAND = Command(serve, _present, changes={"port": {"default": SERVE_PORT}, "ready": None})

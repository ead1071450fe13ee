"""`rlhf serve MODEL`: a model behind an HTTP server, asked as OpenAI's interface is."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rlhf.commands.shared import say
from rlhf.stopping import run_stoppable

if TYPE_CHECKING:
    from rlhf.commands.shared import Subparsers
    from rlhf.stopping import StopRequest

SERVE_PORT = 8702
SERVE_DEADLINE_S = 600.0


def add(commands: Subparsers) -> None:
    command = commands.add_parser("serve", help="serve a model over HTTP, in OpenAI's form")
    add = command.add_argument
    add("model", metavar="MODEL", help="model folder, hub name, LoRA adapter folder or run folder")
    add("--name", help="by which requests call it; MODEL if not given")
    add("--host", default="127.0.0.1", help="address to listen on; others than loopback: a token")
    add("--port", type=int, default=SERVE_PORT, help=f"0: a free one; {SERVE_PORT} if not given")
    add("--token-env", metavar="NAME", help="variable with the token that callers must give, as their API key")
    add("--engines", type=int, default=1, metavar="N", help="among which requests are dealt out; 1")
    add("--tensor-parallel", type=int, default=1, metavar="N", help="GPUs of one engine; 1")
    add("--kv-cache-gib", type=int, metavar="N", help="cache of each engine on a CPU; 1")
    add("--max-length", type=int, metavar="N", help="tokens of prompt and response; what the model takes, up to 8192")
    add(
        "--deadline-s",
        type=float,
        default=SERVE_DEADLINE_S,
        metavar="S",
        help=f"from a request to its answer; {SERVE_DEADLINE_S:g}",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="cpu if not given")
    add("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def run(args: argparse.Namespace) -> int:
    serve(
        args.model,
        name=args.name,
        host=args.host,
        port=args.port,
        token_env=args.token_env,
        engines=args.engines,
        tensor_parallel=args.tensor_parallel,
        kv_cache_gib=args.kv_cache_gib,
        max_length=args.max_length,
        deadline_s=args.deadline_s,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
        ready=lambda url: say(f"serving {url}\n"),
    )
    return 0


def serve(model: str, **options: Any) -> None:
    """Serve a model until interrupted. The options are the arguments of `actors.serving.http.serve`,
    without defaults.
    """

    def work(_: StopRequest) -> None:
        from actors.serving.http import serve as serve_model

        serve_model(model, **options)

    run_stoppable(work)

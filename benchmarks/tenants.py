"""What a Tinker server costs, and what several clients at once gain, in one run.

    python benchmarks/tenants.py [--model models/SmolLM2-135M-Instruct] [--packed-tokens 0 8192]

First the server's own time for a `forward_backward`: the ranks are replaced by an answer at once, so that decoding the
rows, the log of requests, HTTP and encoding of the result remain. The client is in the same process and in the time.

Then real servers, one for each value of `--packed-tokens`. Each client owns an adapter and repeats a step of RL: new
weights for sampling, samples of 4 prompts, `forward_backward` with `importance_sampling`, an optimizer step. In each
round the clients work one after the other, and then at once. The table has the wall times and their ratio.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import tinker
import torch
import yaml
from aiohttp.test_utils import TestServer
from tinker import types
from tinker.proto.request_conv import forward_backward_request_to_proto

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from actors.serving.tinker.http import TinkerServer
from rlhf.adapters import LossReport, LossRows, NamedLoss
from tests.fakes.adapters import FakeAdapters
from tests.fakes.tinker_server import MODEL, opened
from tests.integration.rank_gang import free_port

ROWS, LENGTHS, REPEATS = 32, (128, 1024), 30
RANKS = (4, 8, 4, 8)  # of the clients' adapters
PROMPTS = ("The numbers are", "My number is", "In the year", "It costs")
KEY = "tml-benchmark"
START_WITHIN_S = 600.0


class AtOnce(FakeAdapters):
    """Ranks whose passes take no time."""

    async def forward_backward(
        self, adapter: str, rows: LossRows, loss: NamedLoss, *, forward_only: bool = False
    ) -> LossReport:
        return LossReport(loss=0.0, logprobs=torch.zeros(rows.targets.shape))


async def server_times(folder: Path, length: int) -> list[float]:
    """Return the seconds from sending a request with 32 rows to its result."""
    server = TestServer(TinkerServer(opened(folder, AtOnce(), max_length=length), []).application())
    await server.start_server(auto_decompress=False)
    rng, spent = np.random.default_rng(0), []
    async with aiohttp.ClientSession(server.make_url("/api/v1/"), headers={"x-api-key": KEY}) as http:

        async def send(path: str, body: bytes | None = None, **fields: object) -> aiohttp.ClientResponse:
            answer = await (http.post(path, json=fields) if body is None else http.post(path, data=body))
            answer.raise_for_status()
            return answer

        session = (await (await send("create_session")).json())["session_id"]
        lora = {"rank": 4, "seed": 0}
        made = await send("create_model", session_id=session, model_seq_id=0, base_model=MODEL, lora_config=lora)
        made_request = await made.json()
        await send("retrieve_future", request_id=made_request["request_id"])
        for number in range(1, REPEATS + 1):
            ids = rng.integers(0, 12, (ROWS, length))
            data = []
            for row in ids.tolist():
                inputs: Any = {"target_tokens": row, "weights": [1.0] * length}
                data.append(types.Datum(model_input=types.ModelInput.from_ints(row), loss_fn_inputs=inputs))
            given = types.ForwardBackwardInput(data=data, loss_fn="cross_entropy")
            asked = types.ForwardBackwardRequest(
                forward_backward_input=given, model_id=made_request["model_id"], seq_id=number
            )
            body = forward_backward_request_to_proto(asked).SerializeToString()
            begun = time.perf_counter()
            future = await (await send("forward_backward", body)).json()
            await (await send("retrieve_future", request_id=future["request_id"])).read()
            spent.append(time.perf_counter() - begun)
    await server.close()
    return spent


@contextmanager
def serving(model: str, packed_tokens: int) -> Iterator[str]:
    """Start `rlhf tinker` with half of two cores for the ranks and half for the engine; yield the address."""
    with tempfile.TemporaryDirectory() as folder:
        cluster = {"start_timeout_s": START_WITHIN_S, "roles": {"policy": {"cpus": 0.5}, "rollout": {"cpus": 0.5}}}
        config = {
            "run": {"name": "tenants", "dir": folder},
            "policy": {"model": model, "dtype": "float32", "lora": {"rank": max(RANKS)}},
            "service": {"max_length": 128, "max_adapters": 3 * len(RANKS), "packed_tokens": packed_tokens},
            "cluster": cluster,
        }
        file, port = Path(folder) / "tinker.yaml", free_port()
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [sys.executable, "-m", "rlhf.cli", "tinker", str(file), "--port", str(port)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        try:
            assert process.stdout is not None
            if not process.stdout.readline().startswith("serving"):
                raise SystemExit(process.wait())
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(120)


async def one_step(client: tinker.TrainingClient, prompts: Sequence[list[int]], number: int, tokens: int) -> None:
    """Sample with the newest weights, and train on the samples."""
    sampler = await client.save_weights_and_get_sampling_client()
    params = [types.SamplingParams(max_tokens=tokens, seed=100 * number + place) for place in range(len(prompts))]
    said = await asyncio.gather(
        *(sampler.sample(types.ModelInput.from_ints(ids), 4, of) for ids, of in zip(prompts, params, strict=True))
    )
    rows = []
    for ids, answers in zip(prompts, said, strict=True):
        before = [0.0] * (len(ids) - 1)
        for place, answer in enumerate(answers.sequences):
            whole = [*ids, *answer.tokens]
            columns: Any = {
                "target_tokens": whole[1:],
                "logprobs": [*before, *answer.logprobs],
                "advantages": [*before, *[float(place % 2) - 0.5] * len(answer.tokens)],
            }
            rows.append(types.Datum(model_input=types.ModelInput.from_ints(whole[:-1]), loss_fn_inputs=columns))
    gradient = client.forward_backward(rows, "importance_sampling")
    await asyncio.gather(gradient, client.optim_step(types.AdamParams(learning_rate=1e-5)))


async def tenants(url: str, *, steps: int, tokens: int, rounds: int) -> list[tuple[float, float]]:
    """Return the seconds of each round: the clients one after the other, and at once."""
    service = tinker.ServiceClient(base_url=url, api_key=KEY)
    (model, *_) = (await tinker.RestClient(base_url=url, api_key=KEY).get_server_capabilities()).supported_models
    clients = [await service.create_lora_training_client(model.model_name, rank=rank) for rank in RANKS]
    tokenizer = clients[0].get_tokenizer()
    prompts = [tokenizer.encode(text) for text in PROMPTS]

    async def run(client: tinker.TrainingClient, count: int = steps) -> None:
        for number in range(count):
            await one_step(client, prompts, number, tokens)

    await asyncio.gather(*(run(client, 1) for client in clients))  # warms up
    measured = []
    for _ in range(rounds):
        begun = time.perf_counter()
        for client in clients:
            await run(client)
        between = time.perf_counter()
        await asyncio.gather(*map(run, clients))
        measured.append((between - begun, time.perf_counter() - between))
    service.close("success").result()
    return measured


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny:llama", help="name or folder of the base model")
    parser.add_argument("--packed-tokens", type=int, nargs="+", default=[0, 8192])
    parser.add_argument("--steps", type=int, default=12, help="of each client in a round")
    parser.add_argument("--tokens", type=int, default=24, help="of a sample")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    sys.stdout.write("| tokens of each of 32 rows | server, ms (median) | slowest of 30 |\n|---|---|---|\n")
    for length in LENGTHS:
        with tempfile.TemporaryDirectory() as folder:
            spent = asyncio.run(server_times(Path(folder), length))[1:]
        sys.stdout.write(f"| {length} | {1e3 * statistics.median(spent):.1f} | {1e3 * max(spent):.1f} |\n")
    sys.stdout.write(
        "\n| packed_tokens | one after the other, s | at once, s | throughput at once |\n|---|---|---|---|\n"
    )
    for packed in arguments.packed_tokens:
        with serving(arguments.model, packed) as url:
            for apart, together in asyncio.run(
                tenants(url, steps=arguments.steps, tokens=arguments.tokens, rounds=arguments.rounds)
            ):
                sys.stdout.write(f"| {packed} | {apart:.1f} | {together:.1f} | {apart / together:.2f} |\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()

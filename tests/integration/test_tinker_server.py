"""`rlhf tinker` with real ranks and engines, driven by the official client, over a kill of the server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tinker
import torch
from tinker import types
from tinker.cli.commands.checkpoint import _download_external_weights
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import rlhf
from rlhf.viewing.runs import RunPlaces
from rlhf.vision.keys import image_key
from tests.integration.rank_gang import free_port
from tests.no_pickles import kinds_of
from tests.seen_logprobs import BLUE, RED, SeenModel

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")]
FILE = """\
run: {name: served, dir: FOLDER}
policy: {model: "tiny:KIND", dtype: float32, lora: LORA}
service: {max_length: 128, LIMITS}
cluster: {start_timeout_s: 500, roles: {policy: {cpus: 0.5}, rollout: {cpus: 0.5}}}
"""


class Server:
    def __init__(
        self, folder: Path, *, kind: str = "llama", lora: str = "{rank: 8}", limits: str = "max_models: 8"
    ) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        text = FILE.replace("FOLDER", str(folder)).replace("KIND", kind)
        text = text.replace("LORA", lora).replace("LIMITS", limits)
        (folder / "tinker.yaml").write_text(text, encoding="utf-8")
        self.start()

    def start(self) -> None:
        """Start the server, again if Ray did not start on a busy machine."""
        arguments = ["tinker", str(self.folder / "tinker.yaml"), "--port", str(self.port)]
        command = [sys.executable, "-m", "rlhf.cli", *arguments]
        for _ in range(4):
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
            assert self.process.stdout is not None
            if line := self.process.stdout.readline():
                break
            assert self.process.wait(120) == 1
        assert line == f"serving {self.url}\n"

    def end(self, sign: signal.Signals) -> int:
        os.killpg(self.process.pid, sign)
        return self.process.wait(120)

    def client(self) -> tinker.ServiceClient:
        return tinker.ServiceClient(base_url=self.url, api_key="tml-x")

    def rest(self) -> tinker.RestClient:
        return tinker.RestClient(base_url=self.url, api_key="tml-x")

    def base_model(self) -> str:
        """Return the name of the model in requests."""
        return str(self.rest().get_server_capabilities().result(60).supported_models[0].model_name)

    def step_over_a_kill(self, model: tinker.TrainingClient, row: types.Datum) -> list[float]:
        """Kill and start the server during a training step. Return the loss of the step."""
        pending = model.forward_backward([row], "cross_entropy")
        stepped = model.optim_step(types.AdamParams(learning_rate=0.01))
        time.sleep(0.05)
        self.end(signal.SIGKILL)
        self.start()
        loss = float(pending.result(300).metrics["loss:sum"])
        stepped.result(300)
        return [loss]


@pytest.fixture
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    made = Server(tmp_path, **getattr(request, "param", {}))
    yield made
    if made.process.poll() is None:
        made.end(signal.SIGKILL)


def row_of(tokens: list[int]) -> types.Datum:
    inputs: Any = {"target_tokens": tokens[1:], "weights": [1.0 / len(tokens)] * (len(tokens) - 1)}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def train(trained: tinker.TrainingClient, row: types.Datum, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        made = trained.forward_backward([row], "cross_entropy")
        stepped = trained.optim_step(types.AdamParams(learning_rate=0.01))
        losses.append(float(made.result(120).metrics["loss:sum"]))
        stepped.result(120)
    return losses


def test_clients_train_and_sample_and_continue_after_a_kill(server: Server) -> None:
    client = server.client()
    model = client.create_lora_training_client(base_model=server.base_model(), rank=4, seed=1).result(120)
    tokens = model.get_tokenizer().encode("abcabcabcabc")
    row = row_of(tokens)
    losses = train(model, row, 12)
    assert losses[-1] < 0.95 * losses[0]
    state = model.save_state("state").result(120).path
    sampler = model.save_weights_and_get_sampling_client().result(120)
    scored = sampler.compute_logprobs(types.ModelInput.from_ints(tokens)).result(120)
    trained = model.forward([row], "cross_entropy").result(120).loss_fn_outputs[0]["logprobs"].data
    assert [float(value or 0.0) for value in scored[1:]] == pytest.approx(trained, abs=1e-4)
    before = train(model, row, 1)
    after = server.step_over_a_kill(model, row) + train(model, row, 1)
    again = client.create_training_client_from_state_with_optimizer(state).result(120)
    assert train(again, row, 3) == before + after  # the bits of a server without a kill
    assert sampler.compute_logprobs(types.ModelInput.from_ints(tokens)).result(120) == scored
    client.close("success").result(60)
    runs = RunPlaces([server.folder / "served"]).by_name()
    assert len(runs) == 2
    assert server.end(signal.SIGTERM) == 0


@pytest.mark.parametrize(
    ("server", "ranks", "tolerance"),
    [
        ({}, (4,), 0.0),
        ({"limits": "packed_tokens: 512"}, (4, 8), 1e-5),
        ({"lora": "null"}, (0,), 0.0),
    ],
    indirect=["server"],
    ids=["turns", "packed", "whole"],
)
def test_a_lost_rank_and_a_lost_engine_are_replaced(server: Server, ranks: tuple[int, ...], tolerance: float) -> None:
    """The server stays, and the client gets the numbers of undisturbed models, one for each rank of an adapter."""
    name = server.base_model()
    tokens = [ord(letter) for letter in "abcabcabcabc"]
    row = types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": tokens[1:]})
    prompt = types.ModelInput.from_ints(tokens)

    def losses(disturb: Callable[[int], None]) -> tuple[list[float], list[list[int]]]:
        client = server.client()
        models = [
            client.create_lora_training_client(base_model=name, rank=rank, seed=rank).result(300) for rank in ranks
        ]
        found, drawn = [], []
        for at in range(6):
            made = [model.forward_backward([row], "cross_entropy") for _ in range(2) for model in models]
            stepped = [model.optim_step(types.AdamParams(learning_rate=0.01)) for model in models]
            samplers = [model.save_weights_and_get_sampling_client() for model in models]
            params = types.SamplingParams(max_tokens=16, seed=at)
            asked = [sampler.sample(prompt, 2, params) for sampler in samplers]
            disturb(at)
            found += [float(future.result(300).metrics["loss:sum"]) for future in made]
            for future in stepped:
                future.result(300)
            drawn += [list(sequence.tokens) for future in asked for sequence in future.result(300).sequences]
        client.close("success").result(60)
        return found, drawn

    def kill(at: int) -> None:
        kinds = {1: ("AdapterRank", "WholeRank"), 3: ("AdapterEngine", "WholeEngine"), 4: ("AdapterRank", "WholeRank")}
        for process in psutil.Process(server.process.pid).children(recursive=True):
            if " ".join(process.cmdline()).startswith(tuple(f"ray::{kind}" for kind in kinds.get(at, ("none",)))):
                process.kill()

    (expected, drawn), (found, drawn_again) = losses(lambda at: None), losses(kill)
    assert found == pytest.approx(expected, rel=tolerance, abs=0.0)
    assert drawn_again == drawn
    assert server.process.poll() is None
    lines = (server.folder / "served" / "service" / "errors.jsonl").read_text().splitlines()
    assert [json.loads(line)["source"] for line in lines] == ["policy 0", "rollout 0", "policy 0"]
    page = urllib.request.urlopen(f"{server.url}/metrics", timeout=30).read().decode()
    assert 'rlhf_tinker_recoveries_total{place="ranks"} 2' in page
    assert 'rlhf_tinker_recoveries_total{place="engines"} 1' in page


@pytest.mark.parametrize("server", [{"lora": "null"}], indirect=True)
def test_a_client_trains_all_weights(server: Server, tmp_path: Path) -> None:
    """Samplers keep the weights of their time, and a kill changes nothing."""
    client, name = server.client(), server.base_model()
    base = client.create_sampling_client(base_model=name).result(120)
    with pytest.raises(tinker.RequestFailedError, match="all weights are trained here, without adapters"):
        client.create_lora_training_client(base_model=name, rank=4).result(120)
    model = client.create_lora_training_client(base_model=name, rank=0).result(120)
    assert (model.get_info().is_lora, model.get_info().lora_rank) == (False, None)
    tokens = model.get_tokenizer().encode("abcabcabcabc")
    row, prompt = row_of(tokens), types.ModelInput.from_ints(tokens)

    def scored(sampler: tinker.SamplingClient) -> list[float]:
        return [float(value or 0.0) for value in sampler.compute_logprobs(prompt).result(120)[1:]]

    def forward() -> list[float]:
        return list(model.forward([row], "cross_entropy").result(120).loss_fn_outputs[0]["logprobs"].data)

    times, samplers = [forward()], [base]
    losses = []
    for _ in range(3):
        losses += train(model, row, 4)
        samplers.append(model.save_weights_and_get_sampling_client().result(120))
        times.append(forward())
    assert losses[-1] < 0.95 * losses[0]
    for at in (0, 3, 1, 2, 0, 1):
        assert scored(samplers[at]) == pytest.approx(times[at], abs=1e-4), at
    params = types.SamplingParams(max_tokens=12, seed=3)
    pending = [samplers[at % 4].sample(prompt, 2, params) for at in range(12)]  # of all samplers at once
    drawn = [[sequence.tokens for sequence in future.result(300).sequences] for future in pending]
    assert drawn[:4] == drawn[4:8] == drawn[8:]
    state = model.save_state("state").result(120).path
    kinds = kinds_of(next(server.folder.rglob("weights/state")))
    assert kinds["adapter/state_00000.safetensors"] == "safetensors"
    assert set(kinds.values()) == {"safetensors", "JSON"}, kinds  # no pickle
    before = train(model, row, 1)
    after = server.step_over_a_kill(model, row) + train(model, row, 1)
    with pytest.raises(tinker.BadRequestError, match="trains all weights, of one model at a time"):
        client.create_training_client_from_state(state).result(120)
    model.load_state_with_optimizer(state).result(120)
    assert train(model, row, 3) == before + after  # the bits of a server without a kill
    assert scored(samplers[1]) == pytest.approx(times[1], abs=1e-4)
    exported = model.save_weights_external("out", ttl_seconds=3600).result(120).path
    options: Any = {"show_progress": False, "format": "json", "renew_ttl_seconds": 3600}
    _download_external_weights(server.rest(), exported, tmp_path / "out", **options)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logprobs = whole(input_ids=torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(tokens)[1:, None])[:, 0]
    assert forward() == pytest.approx(chosen.tolist(), abs=1e-4)
    client.close("success").result(60)
    anew = server.client()
    model = anew.create_lora_training_client(base_model=name, rank=0).result(120)
    assert forward() == times[0]
    assert server.end(signal.SIGTERM) == 0


@pytest.mark.parametrize(
    ("server", "rank"),
    [({"kind": "qwen2_5_vl"}, 4), ({"kind": "qwen2_5_vl", "lora": "null"}, 0)],
    indirect=["server"],
    ids=["adapter", "whole"],
)
def test_a_client_trains_and_samples_with_images(server: Server, rank: int, tmp_path: Path) -> None:
    client, name = server.client(), server.base_model()
    model = client.create_lora_training_client(base_model=name, rank=rank, seed=1).result(120)
    encode = model.get_tokenizer().encode
    question, answer = encode("What is this? <|vision_start|>"), encode("<|vision_end|> a red field")

    def asked(data: bytes, expected: int | None = 6) -> types.ModelInput:
        chunk = types.ImageChunk(data=data, format="png", expected_tokens=expected)
        return types.ModelInput.from_ints(question).append(chunk).append(types.EncodedTextChunk(tokens=answer[:-1]))

    unlearnt = len(question) + 5
    inputs: Any = {
        "target_tokens": [*question[1:], *[0] * 6, *answer],
        "weights": [0.0] * unlearnt + [1.0 / len(answer)] * len(answer),
    }
    rows = {data: types.Datum(model_input=asked(data), loss_fn_inputs=inputs) for data in (RED, BLUE)}

    def forward(data: bytes) -> list[float]:
        outputs = model.forward([rows[data]], "cross_entropy").result(120).loss_fn_outputs
        return list(outputs[0]["logprobs"].data)[:-1]

    def scored(sampler: tinker.SamplingClient, data: bytes) -> list[float]:
        found = sampler.compute_logprobs(asked(data)).result(120)
        assert [at for at, value in enumerate(found) if value is None] == [0, *range(len(question), unlearnt + 1)]
        return [float(value or 0.0) for value in found[1:]]

    samplers = [client.create_sampling_client(base_model=name).result(120)]
    times = [[forward(data) for data in (RED, BLUE)]]
    losses = []
    for _ in range(2):
        losses += train(model, rows[RED], 6)
        samplers.append(model.save_weights_and_get_sampling_client().result(120))
        times.append([forward(data) for data in (RED, BLUE)])
    assert losses[-1] < 0.95 * losses[0]
    state = model.save_state("state").result(120).path
    for at in (2, 0, 1, 2):
        for data, expected in zip((RED, BLUE), times[at], strict=True):
            assert scored(samplers[at], data) == pytest.approx(expected, abs=1e-4), at
    red, blue = (values[unlearnt:] for values in times[2])
    assert max(abs(one - two) for one, two in zip(red, blue, strict=True)) > 1e-3  # the image is seen
    params = types.SamplingParams(max_tokens=12, seed=3)

    def drawn() -> list[tuple[list[int], list[float] | None]]:
        futures = [sampler.sample(asked(RED, None), 2, params) for sampler in samplers]  # at once
        return [(list(found.tokens), found.logprobs) for future in futures for found in future.result(120).sequences]

    samples = drawn()
    with pytest.raises(tinker.RequestFailedError, match=r"expects 5 tokens .* the model's processor gives 6"):
        samplers[2].sample(asked(RED, 5), 1, params).result(120)
    before = train(model, rows[BLUE], 1)
    after = server.step_over_a_kill(model, rows[RED])
    model.load_state_with_optimizer(state).result(120)
    assert [forward(data) for data in (RED, BLUE)] == times[2]
    assert train(model, rows[BLUE], 1) + train(model, rows[RED], 1) == before + after  # the bits without a kill
    assert drawn() == samples
    stored = server.folder / "served" / "service" / "images"
    assert len([path for path in stored.iterdir() if path.is_file()]) == 4
    if rank == 0:
        model.load_state(state).result(120)
        exported = model.save_weights_external("out", ttl_seconds=3600).result(120).path
        options: Any = {"show_progress": False, "format": "json", "renew_ttl_seconds": 3600}
        _download_external_weights(server.rest(), exported, tmp_path / "out", **options)
        rlhf.export(next((server.folder / "served").glob("*/weights/state")), tmp_path / "of_state")
        for folder in (tmp_path / "out", tmp_path / "of_state"):
            seen = SeenModel(folder, stored)
            whole = AutoModelForImageTextToText.from_pretrained(folder).eval()
            for data, expected in zip((RED, BLUE), times[2], strict=True):
                ids = [*question, *[-image_key(data)] * 6, *answer[:-1]]
                assert seen.logprobs(whole, ids)[unlearnt + 1 :].tolist() == pytest.approx(
                    expected[unlearnt:], abs=1e-4
                )
        client.close("success").result(60)
        anew = server.client()
        model = anew.create_lora_training_client(base_model=name, rank=0).result(120)
        assert [forward(data) for data in (RED, BLUE)] == times[0]
    assert server.end(signal.SIGTERM) == 0

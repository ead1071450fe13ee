"""The official client, unmodified, before a server with fake ranks and engines in a separate process."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tinker
import torch
from tinker import types
from tinker.cli.commands.checkpoint import _download_external_weights

from tests.fakes.tinker_server import MODEL

KEY = "tml-alice"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Server:
    """A server to kill and to start again at the same address."""

    def __init__(self, folder: Path, module: str = "tests.fakes.tinker_server", *arguments: str) -> None:
        self.folder, self.module, self.arguments = folder, module, arguments
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", self.module, str(self.folder), str(self.port), KEY, *self.arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    made.kill()


@pytest.fixture
def client(server: Server) -> Iterator[tinker.ServiceClient]:
    made = tinker.ServiceClient(base_url=server.url, api_key=KEY)
    yield made
    made.close("success").result(30)


def datum(tokens: list[int], **inputs: Any) -> types.Datum:
    given: Any = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)} | inputs
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=given)


ROWS = [datum([1, 2, 3, 4]), datum([5, 6, 7])]


def step(
    model: tinker.TrainingClient, rows: list[types.Datum] = ROWS, loss: Any = "cross_entropy", lr: float = 0.1
) -> float:
    made = model.forward_backward(rows, loss)
    stepped = model.optim_step(types.AdamParams(learning_rate=lr))
    assert (stepped.result(60).metrics or {})["grad_norm:mean"] >= 0.0
    return float(made.result(60).metrics["loss:sum"])


def test_a_supervised_loop_and_its_state(client: tinker.ServiceClient) -> None:
    model = client.create_lora_training_client(base_model=MODEL, rank=4, seed=1).result(60)
    assert (model.get_info().lora_rank, model.get_info().model_name) == (4, MODEL)
    losses = [step(model) for _ in range(6)]
    assert losses == sorted(losses, reverse=True)
    path = model.save_state("six").result(60).path
    following = step(model)
    again = client.create_training_client_from_state_with_optimizer(path).result(60)
    assert step(again) == following
    plain = client.create_training_client_from_state(path).result(60)
    assert (step(plain), step(plain) == step(model)) == (following, False)
    evaluated = model.forward(ROWS, "cross_entropy").result(60)
    assert [len(output["logprobs"].data) for output in evaluated.loss_fn_outputs] == [3, 2]


def test_a_loop_with_samples_raises_the_reward(client: tinker.ServiceClient) -> None:
    """Importance sampling towards the token 5: advantages are rewards minus their mean."""
    model = client.create_lora_training_client(base_model=MODEL, rank=4, seed=1).result(60)
    means = []
    for at in range(8):
        sampler = model.save_weights_and_get_sampling_client()
        params = types.SamplingParams(max_tokens=4, seed=at * 100, stop=[])
        answer = sampler.sample(types.ModelInput.from_ints([1]), 16, params).result(60)
        rewards = [sum(token == 5 for token in sequence.tokens) / 4 for sequence in answer.sequences]
        means.append(sum(rewards) / len(rewards))
        rows = []
        for sequence, reward in zip(answer.sequences, rewards, strict=True):
            tokens = [1, *sequence.tokens]
            inputs: Any = {
                "target_tokens": tokens[1:],
                "logprobs": list(sequence.logprobs or ()),
                "advantages": [reward - means[-1]] * 4,
            }
            row = types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)
            rows.append(row)
        step(model, rows, "importance_sampling", lr=0.4)
    assert means[-1] > means[0] + 0.3


def test_a_loss_of_the_client_and_the_named_loss_give_the_same_weights(client: tinker.ServiceClient) -> None:
    models = [client.create_lora_training_client(base_model=MODEL, rank=4, seed=1).result(60) for _ in range(2)]

    def loss(data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        total = -torch.stack([row.sum() for row in logprobs]).sum()
        return total, {"mine:sum": float(total.detach())}

    for _ in range(3):
        made = models[0].forward_backward_custom(ROWS, loss)
        models[0].optim_step(types.AdamParams(learning_rate=0.1)).result(60)
        metrics = made.result(60).metrics
        assert metrics["loss:sum"] == metrics["mine:sum"] == pytest.approx(step(models[1]), rel=1e-6)


def test_rows_in_chunks_that_arrive_in_any_order(client: tinker.ServiceClient, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [datum([1 + at % 8, 2 + at % 8, 3 + at % 8]) for at in range(9)]
    whole = client.create_lora_training_client(base_model=MODEL, rank=4, seed=1).result(60)
    model = client.create_lora_training_client(base_model=MODEL, rank=4, seed=1).result(60)
    expected = [step(whole, many) for _ in range(3)]
    small = client.holder._client_config.model_copy(update={"fwdbwd_max_chunk_len": 2})
    monkeypatch.setattr(client.holder, "_client_config", small)
    assert [step(model, many) for _ in range(3)] == pytest.approx(expected, rel=1e-5)
    answer = model.forward(many, "cross_entropy").result(60)
    assert len(answer.loss_fn_outputs) == 9


def test_samples_have_everything_that_was_asked_for(client: tinker.ServiceClient) -> None:
    sampler = client.create_sampling_client(base_model=MODEL).result(60)
    prompt, params = types.ModelInput.from_ints([1, 2, 3]), types.SamplingParams(max_tokens=5, seed=7, stop=[])
    asked: Any = {"include_prompt_logprobs": True, "topk_prompt_logprobs": 2, "topk_sample_logprobs": 3}
    answers = [sampler.sample(prompt, 2, params, **asked) for _ in range(20)]
    first = answers[0].result(60)
    assert all(other.result(60).sequences[1].tokens == first.sequences[1].tokens for other in answers)
    assert len({sequence.sequence_id for other in answers for sequence in other.result(60).sequences}) == 40
    assert [len(row or ()) for row in first.topk_prompt_logprobs or ()] == [0, 2, 2]
    assert [len(row or ()) for row in first.sequences[0].topk_logprobs or ()] == [3] * 5
    scored = sampler.compute_logprobs(prompt).result(60)
    assert scored == first.prompt_logprobs
    assert sampler.compute_logprobs(prompt, prompt_logprobs_last_n=1).result(60) == [None, None, scored[2]]
    copied = tinker.SamplingClient.from_sampler_handle(sampler.get_sampler_handle(), api_key=KEY)
    assert copied.sample(prompt, 2, params).result(60).sequences[1].tokens == first.sequences[1].tokens
    with pytest.raises(tinker.RequestFailedError, match="prompt_alt_tokens_k is not supported here"):
        sampler.sample(prompt, 1, params, prompt_alt_tokens_k=2).result(60)


def test_errors_reach_the_client_in_their_category(client: tinker.ServiceClient) -> None:
    model = client.create_lora_training_client(base_model=MODEL, rank=4, seed=1).result(60)
    for failing, text in (
        (lambda: model.forward_backward([datum([1, 99])], "cross_entropy"), "a token is not below 12"),
        (lambda: model.optim_step(types.AdamParams()), r"request \d+ failed: a token is not below 12"),
        (lambda: model.optim_step(types.optimizer.DimuonParams(learning_rate=0.1)), "dimuon is not supported"),
        (lambda: model.forward_backward(ROWS, "gspo"), "gspo is not known"),
        (lambda: model.save_state("a b"), "must be 1 to 128 letters"),
    ):
        with pytest.raises(tinker.RequestFailedError, match=text) as caught:
            failing().result(60)
        assert caught.value.category == types.RequestErrorCategory.User
    with suppress(tinker.RequestFailedError):
        model.optim_step(types.AdamParams()).result(60)
    assert step(model) > 0.0
    with pytest.raises(tinker.BadRequestError, match="base_model 'other' is not served here"):
        client.create_lora_training_client(base_model="other", rank=4).result(60)
    with pytest.raises(tinker.AuthenticationError):
        tinker.ServiceClient(base_url=client.holder._base_url, api_key="tml-eve").holder.get_session_id()


def test_listings_and_a_download(client: tinker.ServiceClient, server: Server, tmp_path: Path) -> None:
    model = client.create_lora_training_client(base_model=MODEL, rank=4, seed=1).result(60)
    step(model)
    path = model.save_state("listed", user_metadata={"a": "b"}).result(60).path
    rest = tinker.RestClient(base_url=server.url, api_key=KEY)
    (entry,) = rest.list_checkpoints(model.model_id).result(60).checkpoints
    assert (entry.tinker_path, entry.checkpoint_type, entry.user_metadata) == (path, "training", {"a": "b"})
    run = rest.get_training_run(model.model_id).result(60)
    assert (run.lora_rank, run.last_checkpoint) == (4, entry)
    assert model.model_id in {r.training_run_id for r in rest.list_training_runs().result(60).training_runs}
    assert rest.get_weights_info_by_tinker_path(path).result(60).lora_rank == 4
    session = client.holder.get_session_id()
    assert session in rest.list_sessions().result(60).sessions
    assert rest.get_session(session).result(60).training_run_ids == [model.model_id]
    exported = model.save_weights_external("out", ttl_seconds=3600).result(60).path
    options: Any = {"show_progress": False, "format": "json", "renew_ttl_seconds": 3600}
    size = _download_external_weights(rest, exported, tmp_path, **options)
    assert size == sum(file.stat().st_size for file in tmp_path.iterdir())
    environment = os.environ | {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": KEY}
    command = [sys.executable, "-m", "tinker.cli", "checkpoint", "download", path, "--output", str(tmp_path / "state")]
    subprocess.run(command, env=environment, check=True, timeout=120)
    (folder,) = (tmp_path / "state").iterdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()
    rest.delete_checkpoint_from_tinker_path(path).result(60)
    with pytest.raises(tinker.NotFoundError):
        rest.get_weights_info_by_tinker_path(path).result(60)
    with pytest.raises(tinker.BadRequestError, match="publishing checkpoints is not supported"):
        rest.publish_checkpoint_from_tinker_path(exported).result(60)


@pytest.mark.slow
def test_ten_kills_under_load_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    """Two models train and sample while the server dies ten times, with the losses of a quiet server."""
    quiet = Server(tmp_path / "quiet")
    expected = [run_clients(quiet.url, lambda: None)]
    quiet.kill()
    unsafe = Server(tmp_path / "unsafe")
    calls, kills = itertools.count(1), itertools.count(1)

    def kill() -> None:
        if next(calls) % 4 == 0:
            unsafe.kill()
            next(kills)
            unsafe.start()

    assert [run_clients(unsafe.url, kill)] == expected
    unsafe.kill()
    assert next(kills) > 10
    for folder in unsafe.folder.glob("*-train-*"):
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 40


def run_clients(url: str, disturb: Callable[[], None]) -> tuple[list[float], list[list[int]]]:
    service = tinker.ServiceClient(base_url=url, api_key=KEY)
    models = [service.create_lora_training_client(base_model=MODEL, rank=4, seed=seed).result(120) for seed in (1, 2)]
    losses, drawn = [], []
    for at in range(40):
        made = [model.forward_backward(ROWS, "cross_entropy") for model in models]
        stepped = [model.optim_step(types.AdamParams(learning_rate=0.02)) for model in models]
        disturb()
        losses += [future.result(300).metrics["loss:sum"] for future in made]
        for future in stepped:
            future.result(300)
        if at % 8 == 0:
            sampler = models[0].save_weights_and_get_sampling_client()
            answer = sampler.sample(types.ModelInput.from_ints([1]), 1, types.SamplingParams(max_tokens=8, seed=at))
            disturb()
            drawn.append(list(answer.result(300).sequences[0].tokens))
    service.close("success").result(60)
    return losses, drawn

"""`rlhf train` with a policy behind `rlhf tinker`, on real ranks and engines, equals `rlhf train` with LoRA."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf.engine.tinker_client import TinkerClient, TinkerEndpoint
from tests.integration.recipes import merge, rows, start, train, write_config
from tests.integration.test_tinker_server import Server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
RANK, SEED = 8, 0
BASE: dict[str, Any] = {
    "run": {"name": "run", "seed": SEED},
    "data": {"apply_chat_template": False},
    "train": {"steps": 4, "lr": 1e-4, "max_tokens_per_microbatch": 256, "checkpoint_every": 1, "betas": [0.9, 0.95]},
    "cluster": {"object_store_gib": 0.25, "start_timeout_s": 500.0, "call_timeout_s": 300.0},
}
GRPO: dict[str, Any] = {
    "algorithm": {"name": "grpo", "kl": {"coef": 0.05, "estimator": "k3", "place": "loss"}},
    "data": {"train": {"task": "running_totals", "split": "train", "size": 64}, "max_prompt_tokens": 16},
    "rollouts": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_new_tokens": 8},
    "rewards": {"digits": {"function": "format_regex", "args": {"pattern": "(?s).*[0-9].*"}}},
    "train": {"sequences_per_update": 8},
}
DPO: dict[str, Any] = {
    "algorithm": {"name": "dpo", "beta": 0.5},
    "data": {"train": {"task": "running_totals", "split": "pairs", "size": 32}},
    "train": {"sequences_per_update": 8},
}
SFT: dict[str, Any] = {
    "algorithm": {"name": "sft"},
    "data": {"train": {"task": "running_totals", "split": "sft", "size": 64}},
    "train": {"sequences_per_update": 16},
}
COMPARED = (
    "update/loss/mean",
    "update/grad_norm",
    "rewards/score/mean",
    "experience/kl_ref/mean",
    "preference/margin/mean",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    os.environ["TINKER_API_KEY"] = "tml-x"
    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    if made.process.poll() is None:
        made.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def model(server: Server) -> str:
    (folder,) = (server.folder / "served" / "service" / "models").iterdir()
    return str(folder)


def initial_adapter(server: Server, model: str, folder: Path) -> Path:
    """Return the adapter with which a run through the server begins, with the seed of the run."""
    from rlhf.engine.tinker_engine import TinkerEngine

    client = TinkerClient(TinkerEndpoint.of(server.url, model), run="initial", limit_s=120.0)
    settings: Any = {"optimizer": None, "schedule": None}
    folder.mkdir()
    TinkerEngine(client, None, rank=RANK, seed=SEED, **settings).download(folder)
    client.close()
    return folder


def remote(server: Server, model: str, folder: Path, *parts: Mapping[str, Any]) -> Path:
    folder.mkdir()
    tree: Any = {"run": {"dir": str(folder)}, "policy": {"model": model, "dtype": "float32", "lora": {"rank": RANK}}}
    for part in (*parts, {"policy": {"tinker": server.url}}):
        tree = merge(tree, part)
    return write_config(folder / "run.yaml", tree, merge(BASE, {}))


def final(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "adapter_model.safetensors")


@pytest.mark.parametrize("part", [SFT, DPO, GRPO], ids=["sft", "dpo", "grpo"])
def test_a_run_through_a_server_is_the_run_with_lora(
    server: Server, model: str, tmp_path: Path, part: dict[str, Any]
) -> None:
    train(remote(server, model, tmp_path / "remote", part), timeout_s=900.0)
    adapter = initial_adapter(server, model, tmp_path / "initial")
    here = {"run": {"dir": str(tmp_path)}, "policy": {"model": model, "dtype": "float32", "lora": {}}}
    local = merge(merge(here, part), {"policy": {"adapter": str(adapter)}, "run": {"name": "local"}})
    train(write_config(tmp_path / "local.yaml", local, BASE), timeout_s=900.0)
    theirs, ours = rows(tmp_path / "remote" / "run"), rows(tmp_path / "local")
    assert len(theirs) == len(ours) == 4
    for there, own in zip(theirs, ours, strict=True):
        for name in COMPARED:
            assert (name in there) == (name in own)
            assert there.get(name, 0.0) == pytest.approx(own.get(name, 0.0), rel=1e-5, abs=1e-6), name
    there, own = final(tmp_path / "remote" / "run"), final(tmp_path / "local")
    assert there.keys() == own.keys()
    change = max(
        float((own[name] - begun).abs().max())
        for name, begun in load_file(adapter / "adapter_model.safetensors").items()
    )
    worst = max(float((there[name] - own[name]).abs().max()) for name in own)
    assert worst <= 1e-6 < 1e-4 < change, f"largest difference {worst:.2e}, largest change {change:.2e}"


def test_a_killed_run_resumes_over_a_kill_of_the_server(server: Server, model: str, tmp_path: Path) -> None:
    whole = remote(server, model, tmp_path / "whole", GRPO)
    train(whole, timeout_s=900.0)
    config = remote(server, model, tmp_path / "killed", GRPO)
    process, run = start(config), tmp_path / "killed" / "run"
    limit = time.monotonic() + 600.0
    while not (run / "checkpoints" / "step_000002").exists():
        assert time.monotonic() < limit
        assert process.poll() is None, config.with_suffix(".log").read_text()
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    server.end(signal.SIGKILL)
    server.start()
    train(config, "--resume", "auto", timeout_s=900.0)
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]
    there, own = final(run), final(tmp_path / "whole" / "run")
    assert max(float((there[name] - own[name]).abs().max()) for name in own) == 0.0

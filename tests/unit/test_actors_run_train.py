"""A pipeline writes to the pipeline's folder. tests/integration/test_stages.py trains."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml

from actors.run import train as module
from actors.run.train import launch
from rlhf.config.files.load import load
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.preflight.start import Start
from rlhf.process.stopping import StopRequest


def test_a_pipeline_s_file_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    build_tiny_llama(tmp_path / "a-long-secret", seed=1)
    monkeypatch.setenv("STORE_TOKEN", "a-long-secret")
    monkeypatch.setattr("rlhf.tracking.logs.configure", lambda: None)  # it is for a whole process
    models = {"a": {"model": str(tiny_model)}, "b": {"model": str(tmp_path / "a-long-secret")}}
    mean = {"mean": {"merge": {"method": "linear", "models": models}}}
    (tmp_path / "soup.yaml").write_text(yaml.safe_dump({"run": {"name": "soup", "dir": str(tmp_path)}, "stages": mean}))
    launch(load(tmp_path / "soup.yaml"), Start(resume=False, mode="quiet"))
    assert (tmp_path / "soup/mean/final/model.safetensors").exists()
    said = (tmp_path / "soup/config.resolved.yaml").read_text()
    assert str(tiny_model) in said
    assert "a-long-secret" not in said


@pytest.mark.parametrize(("node", "is_watched"), [("head", True), ("worker", True), ("other", False)])
def test_a_drain_of_the_driver_s_node_is_noticed_too(
    monkeypatch: pytest.MonkeyPatch, node: str, is_watched: bool
) -> None:
    async def look(*_: Any, draining_node: Any, **__: Any) -> bool:
        assert await draining_node() == ((node, 5.0) if is_watched else None)
        return False

    monkeypatch.setattr(module, "run_loop", look)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "head"))
    monkeypatch.setattr("ray._private.state.state", SimpleNamespace(get_draining_nodes=lambda: {node: 5000}))
    limits = SimpleNamespace(train=SimpleNamespace(preemption_grace_s=1.0), cluster=SimpleNamespace(call_timeout_s=1.0))
    supervisor = SimpleNamespace(continue_after=lambda _: None)
    controller: Any = SimpleNamespace(config=limits, run=lambda until: None, notice=None, supervisor=supervisor)
    asyncio.run(module._carry_out(controller, StopRequest(), step=None, until=None, nodes=lambda: {"worker"}))

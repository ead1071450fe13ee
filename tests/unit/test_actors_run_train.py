"""What a pipeline leaves in its own folder. With training in it: tests/integration/test_stages.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from actors.run.train import launch
from rlhf.config.files.load import load
from rlhf.models.tiny import build_tiny_llama


def test_a_pipeline_s_file_holds_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    build_tiny_llama(tmp_path / "a-long-secret", seed=1)
    monkeypatch.setenv("STORE_TOKEN", "a-long-secret")
    monkeypatch.setattr("rlhf.tracking.logs.configure", lambda: None)  # it is for a whole process
    merge = {
        "method": "linear",
        "models": {"a": {"model": str(tiny_model)}, "b": {"model": str(tmp_path / "a-long-secret")}},
    }
    (tmp_path / "soup.yaml").write_text(
        yaml.safe_dump({"run": {"name": "soup", "dir": str(tmp_path)}, "stages": {"mean": {"merge": merge}}})
    )
    launch(load(tmp_path / "soup.yaml"), resume=False, quiet=True)
    assert (tmp_path / "soup/mean/final/model.safetensors").exists()
    said = (tmp_path / "soup/config.resolved.yaml").read_text()
    assert str(tiny_model) in said
    assert "a-long-secret" not in said

"""The file of `rlhf tinker`: few keys, and an error for each that would have no effect."""

from __future__ import annotations

from pathlib import Path

import pytest

import rlhf
from rlhf.errors import UserError

BASE = "run: {name: server}\npolicy: {model: tiny:llama, lora: {rank: 4}}\n"


def load(folder: Path, text: str = "", *overrides: str) -> object:
    path = folder / "tinker.yaml"
    path.write_text(BASE + text, encoding="utf-8")
    return rlhf.load_service(path, overrides)


def test_a_short_file_has_defaults(tmp_path: Path) -> None:
    config = rlhf.load_service(_write(tmp_path, "run: {name: server}\npolicy: {model: tiny:llama}\n"))
    assert (config.policy.lora.rank, config.service.max_length, config.run.dir) == (32, 2048, Path("runs"))
    changed = rlhf.load_service(tmp_path / "tinker.yaml", ["service.max_length=64", "policy.lora.rank=4"])
    assert (changed.policy.lora.rank, changed.service.max_length) == (4, 64)


def _write(folder: Path, text: str) -> Path:
    path = folder / "tinker.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("algorithm: {name: sft}\n", "algorithm: is no section of a server"),
        ("service: {max_lenght: 3}\n", "service.max_lenght: .*max_length"),
        ("service: {max_length: 1}\n", "service.max_length"),
        ("service: {model_name: 'tiny:llama'}\n", "service.model_name"),
        ("cluster: {roles: {critic: {workers: 2}}}\n", "cluster.roles.critic: has no effect here"),
        ("cluster: {weight_sync: gloo}\n", "cluster.weight_sync: is gloo, and has no effect here"),
        (
            "cluster: {roles: {policy: {zero_stage: 2}}}\n",
            "policy.zero_stage: is 2, .* trained only at 0 or 3",
        ),
        (
            "cluster: {roles: {policy: {workers: 2, sequence_parallel: 2}}}\n",
            "policy.sequence_parallel: is 2, but ranks do not share",
        ),
        (
            "cluster: {roles: {policy: {zero_stage: 3, offload: [optimizer]}}}\n",
            "policy.offload: has optimizer, but clients' models stay",
        ),
        ("cluster: {roles: {rollout: {engines: {min: 1, max: 2}}}}\n", "cluster.roles.rollout.engines: is a range"),
        ("cluster: {roles: {rollout: {colocate_with: policy}}}\n", "colocate_with: is policy, but clients train"),
        ("cluster: {roles: {rollout: {tensor_parallel: 2}}}\n", "tensor_parallel: has no effect here"),
    ],
)
def test_a_key_without_effect_is_an_error(text: str, error: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=error) as caught:
        load(tmp_path, text)
    assert "tinker.yaml:3" in str(caught.value)


def test_only_the_adapters_rank_is_the_servers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"policy\.lora\.alpha"):
        load(tmp_path, "", "policy.lora.alpha=3")
    with pytest.raises(UserError, match=r"run\.mirror"):
        load(tmp_path, "", "run.mirror=s3://bucket")


def test_without_an_adapter_all_weights_are_trained(tmp_path: Path) -> None:
    config = rlhf.load_service(_write(tmp_path, BASE), ["policy.lora=null"])
    assert config.policy.lora is None
    for key in ("max_adapters", "packed_tokens"):
        with pytest.raises(UserError, match=rf"service\.{key}: has no effect without policy\.lora"):
            load(tmp_path, f"service: {{{key}: 4}}\n", "policy.lora=null")


def test_a_run_points_at_the_command(tmp_path: Path) -> None:
    path = _write(tmp_path, BASE + "service: {}\n")
    with pytest.raises(UserError, match=r"service: is no section of a run; use `rlhf tinker"):
        rlhf.load_config(path)

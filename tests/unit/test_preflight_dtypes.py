"""A model without a dtype gets the data type that its device multiplies fastest, in a run that continues too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.config.files.dump import dump_yaml
from rlhf.config.files.load import LoadedConfig, checked, from_mapping
from rlhf.config.schema.model import PolicyConfig
from rlhf.config.yaml_tree import from_yaml
from rlhf.models.on_disk import find_model
from rlhf.objectives import costs
from rlhf.planning.summary import stage_text
from rlhf.preflight.dtypes import chosen_dtype, with_recorded_dtypes
from tests.fixtures.models import changed_copy

LAPTOP = "vendor_id : GenuineIntel\nflags : fpu avx2 fma\n"
SERVER = "vendor_id : AuthenticAMD\nflags : fpu avx512f avx512_bf16\n"


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    costs.multiplies_bfloat16_fast.cache_clear()


@pytest.fixture
def cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file in place of /proc/cpuinfo, of a laptop at first."""
    monkeypatch.setattr(costs, "CPUINFO", tmp_path / "cpuinfo")
    return become(tmp_path / "cpuinfo", LAPTOP)


def become(cpu: Path, text: str) -> Path:
    cpu.write_text(text)
    costs.multiplies_bfloat16_fast.cache_clear()
    return cpu


def loaded(folder: Path, *overrides: str) -> LoadedConfig:
    tree = {
        "run": {"name": "demo", "dir": str(folder)},
        "policy": {"model": "some/model"},
        "algorithm": {"name": "ppo", "kl": {"coef": 0.1}},
        "data": {"train": "prompts.jsonl"},
        "rollouts": {"max_new_tokens": 50},
        "rewards": {"correct": {"function": "math_answer"}},
        "train": {"steps": 10, "lr": 1e-6, "sequences_per_update": 128},
        "critic": {"model": "other/model", "dtype": "bfloat16"},
        "reference": {"model": "third/model"},
    }
    return from_mapping(tree, overrides)


def dtypes(config: LoadedConfig) -> tuple[str, str, str]:
    (run,) = config.runs.values()
    assert run.critic is not None
    assert run.reference is not None
    return run.policy.dtype, run.critic.dtype, run.reference.dtype


@pytest.mark.parametrize(
    ("text", "device", "dtype"),
    [(LAPTOP, "cpu", "float32"), (SERVER, "cpu", "bfloat16"), (LAPTOP, "cuda", "bfloat16")],
)
def test_the_device_chooses_the_dtypes_that_are_not_written(
    tmp_path: Path, cpu: Path, text: str, device: str, dtype: str
) -> None:
    become(cpu, text)
    config = loaded(tmp_path, f"cluster.device={device}")
    assert dtypes(config) == (dtype, "bfloat16", dtype)
    assert (chosen_dtype(config) or "").startswith(f"policy.dtype={dtype}, reference.dtype={dtype}, because ")
    assert dtypes(loaded(tmp_path, f"cluster.device={device}", "policy.dtype=float32"))[0] == "float32"
    (run,) = config.runs.values()
    assert from_yaml(dump_yaml(run))["policy"]["dtype"] == dtype
    assert f"The default here is {dtype}, " in stage_text(run, None)


def test_a_configuration_built_in_python_gets_them_too(tmp_path: Path, cpu: Path) -> None:
    (run,) = loaded(tmp_path).runs.values()
    built = run.model_copy(update={"policy": PolicyConfig(model="some/model")})
    assert dtypes(checked(built)) == ("float32", "bfloat16", "float32")


def test_a_written_dtype_is_no_choice(tmp_path: Path, cpu: Path) -> None:
    assert chosen_dtype(loaded(tmp_path, "policy.dtype=float32", "reference.dtype=float32")) is None


def test_a_run_continues_in_its_dtypes_on_another_cpu(tmp_path: Path, cpu: Path) -> None:
    before = loaded(tmp_path)
    before.folder.mkdir()
    (before.folder / "config.resolved.yaml").write_text(dump_yaml(before))
    become(cpu, SERVER)
    assert dtypes(loaded(tmp_path)) == ("bfloat16", "bfloat16", "bfloat16")
    assert dtypes(with_recorded_dtypes(loaded(tmp_path))) == ("float32", "bfloat16", "float32")
    written = with_recorded_dtypes(loaded(tmp_path, "policy.dtype=bfloat16"))
    assert dtypes(written) == ("bfloat16", "bfloat16", "float32")
    assert with_recorded_dtypes(loaded(tmp_path, "run.name=other")) == loaded(tmp_path, "run.name=other")


@pytest.mark.parametrize(("text", "dtype"), [(LAPTOP, "float32"), (SERVER, "bfloat16")])
def test_a_stored_model_is_served_in_a_fast_dtype(
    tiny_model: Path, tmp_path: Path, cpu: Path, text: str, dtype: str
) -> None:
    become(cpu, text)
    folder = changed_copy(tiny_model, tmp_path / "model", dtype="bfloat16")
    assert find_model(str(folder), trust_remote_code=False, device="cpu").dtype == dtype
    assert find_model(str(folder), trust_remote_code=False, device="cuda").dtype == "bfloat16"

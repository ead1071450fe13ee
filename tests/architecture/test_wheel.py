"""The wheel holds the recipes, and the installed commands work without the repository.

The slow tests install the wheel into an empty environment, and run the quickstart in an empty folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("pyproject.toml", "README.md", "LICENSE", "rlhf", "actors", "configs")
INSTALL_S, RUN_S = 900, 1500


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, since setuptools writes into the source folder. Needs no network."""
    folder = tmp_path_factory.mktemp("source")
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    command = [sys.executable, "-c", build, str(folder / "dist")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (folder / "dist").glob("*.whl")
    return path


def test_the_wheel_holds_every_recipe_and_no_other_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"rlhf/recipes/{path.name}" for path in (ROOT / "configs").glob("*.yaml")} <= names
    assert "rlhf/tested_versions.txt" in names
    assert {f"rlhf/{folder}/{name}.csv" for folder in ("config/mistakes/settings", "converting/rules")
            for name in ("trl", "verl", "openrlhf")} <= names  # fmt: skip
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"rlhf", "actors"}


def test_a_recipe_is_planned_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    command = [sys.executable, "-m", "rlhf.cli", "plan", "recipe:quickstart_grpo", "--cluster", "cpu=2"]
    env = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "quickstart-grpo/grpo" in done.stdout


def run(command: list[str], folder: Path, timeout_s: int, **variables: str) -> str:
    """Run a command without the repository on the path, and return stdout."""
    left_out = ("PYTHONPATH", "VIRTUAL_ENV")
    env = {name: value for name, value in os.environ.items() if name not in left_out} | variables
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def wheels_known_to_pip() -> str:
    """Return the folder of wheels that pip knows of, for uv, or ""."""
    if folder := os.environ.get("PIP_FIND_LINKS"):
        return folder
    command = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()


@pytest.mark.slow
@pytest.mark.timeout(INSTALL_S + RUN_S + 300)
@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_two_commands_lead_from_an_empty_environment_to_a_trained_model(
    wheel: Path, tmp_path: Path, installer: str
) -> None:
    """torchaudio and torchcodec for CUDA may be installed. The trained model proves that no process imports them."""
    environment, folder = tmp_path / "environment", tmp_path / "empty"
    folder.mkdir()
    wanted = f"ray-rlhf[cpu] @ {wheel.as_uri()}"
    if installer == "pip":
        run([sys.executable, "-m", "venv", str(environment)], folder, 120)
        run([str(environment / "bin/pip"), "install", "--quiet", wanted], folder, INSTALL_S)
    else:
        wheels = wheels_known_to_pip()
        source = [f"--find-links={wheels}"] if wheels else ["--torch-backend=cpu"]
        uv = str(Path(sys.executable).with_name("uv"))
        run([uv, "venv", "--quiet", "--python", sys.executable, str(environment)], folder, 120)
        install = [uv, "pip", "install", "--quiet", "--python", str(environment / "bin/python"), *source, wanted]
        run(install, folder, INSTALL_S, UV_SYSTEM_CERTS="1")
    rlhf = str(environment / "bin/rlhf")
    cache = str(tmp_path / "cache")  # empty, as on a new machine: vLLM inspects the model in a process of its own
    assert "held-out accuracy" in run([rlhf, "quickstart"], folder, RUN_S, VLLM_CACHE_ROOT=cache)
    assert "torch==" in run([rlhf, "doctor", "--versions"], folder, 60)
    assert "grpo_smollm2" in run([rlhf, "recipes"], folder, 60)

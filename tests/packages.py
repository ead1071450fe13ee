"""Packages with entry points, made by hand in a folder of a test."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest


def install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, package: str, *, code: str = "", **offers: Mapping[str, str]
) -> None:
    """Install a package with the module PACKAGE_code. `offers` are the entry points: by kind, by name."""
    (folder / f"{package}_code.py").write_text(code)
    about = folder / f"{package}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    groups = (
        f"[rlhf.{kind}]\n" + "".join(f"{name} = {target}\n" for name, target in names.items())
        for kind, names in offers.items()
    )
    (about / "entry_points.txt").write_text("\n".join(groups))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, f"{package}_code", raising=False)

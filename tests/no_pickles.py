"""What the files of a checkpoint are, by their content."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open


def kinds_of(folder: Path) -> dict[str, str]:
    """Return the kind of each file below a folder, whatever its name: safetensors, JSON, or unknown, as a pickle."""
    return {str(path.relative_to(folder)): _kind(path) for path in folder.rglob("*") if path.is_file()}


def _kind(path: Path) -> str:
    try:
        with safe_open(path, framework="pt"):
            return "safetensors"
    except SafetensorError:
        pass
    try:
        text = path.read_text(encoding="utf-8")
        try:
            json.loads(text)
        except ValueError:
            for line in text.splitlines():
                json.loads(line)
    except ValueError:
        return "unknown"
    return "JSON"

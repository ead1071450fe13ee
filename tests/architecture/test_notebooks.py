"""The notebooks are stored with the outputs of a whole execution, small, and without paths of a machine."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_BYTES = 300_000
MACHINE = re.compile(r"/(?:home|root|tmp|work|Users|opt|usr|var)/")


def test_the_page_names_each() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert NOTEBOOKS
    assert re.findall(r"\(\.\./notebooks/(\w+\.ipynb)\)", page) == [path.name for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_the_outputs_of_a_whole_execution(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    notebook: dict[str, Any] = json.loads(text)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert "error" not in {output["output_type"] for output in outputs}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(cell["metadata"] for cell in code)  # no times of the execution
    assert len(text.encode()) < MOST_BYTES
    assert not MACHINE.search(text)
    for cell in code:
        ast.parse("".join(cell["source"]))
    for link in re.findall(r"\]\(([^):#]+)\)", "".join("".join(cell["source"]) for cell in notebook["cells"])):
        assert (path.parent / link).exists(), link

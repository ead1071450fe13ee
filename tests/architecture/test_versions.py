"""The tested versions lie inside the ranges of pyproject.toml, and name every package of a CPU installation."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.tested_versions import FILE, requirements

ROOT = Path(__file__).resolve().parents[2]


def versions() -> dict[str, str]:
    lines = [line for line in FILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.!]+", line) for line in lines)  # no addresses, no local builds
    return dict(line.split("==") for line in lines)


def test_the_tested_versions_are_in_the_ranges_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = [Requirement(text) for text in (*project["dependencies"], *extras["cpu"])]
    tested = versions()
    for requirement in [*needed, *(Requirement(text) for texts in extras.values() for text in texts)]:
        version = tested.get(canonicalize_name(requirement.name))
        assert version is not None or requirement not in needed, f"{requirement}: run scripts/tested_versions.py"
        assert version is None or requirement.specifier.contains(version, prereleases=True), requirement


def test_markers_and_extras_decide_which_requirements_count() -> None:
    texts = ["a>=1", "b; python_version < '3'", "c[x]; extra == 'y'", "d; extra == 'z'"]
    assert [str(requirement.name) for requirement in requirements(texts, ["y"])] == ["a", "c"]


def test_every_advice_to_install_names_an_extra_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = [
        path.read_text(encoding="utf-8") for folder in ("rlhf", "actors") for path in (ROOT / folder).rglob("*.py")
    ]
    advice = [match for text in texts for match in re.findall(r"pip install '([\w-]+)\[(\w[\w,-]*)\]", text)]
    assert len(advice) > 5
    wrong = [(name, extra) for name, extra in advice if name != project["name"]]
    unknown = {extra for _, extras in advice for extra in extras.split(",")} - project["optional-dependencies"].keys()
    assert not wrong
    assert not unknown

"""Write rlhf/tested_versions.txt: the versions in this environment of everything that the project installs.

    .venv/bin/python scripts/tested_versions.py

Run it after `make test` has passed in the environment. `rlhf doctor --versions` prints the file. `pip install -c` takes
it, so a version is public: the local part of a build, such as +cpu, is left out.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "rlhf" / "tested_versions.txt"
LEFT_OUT = ("dev",)
HEADING = "# Versions with which the tests of ray-rlhf passed, on Python {python}, for: pip install -c FILE\n"


def requirements(texts: Iterable[str], extras: Iterable[str] = ()) -> Iterator[Requirement]:
    """Yield the requirements that hold on this machine with these extras."""
    for requirement in map(Requirement, texts):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in (*extras, "")):
            yield requirement


def installed(project: Mapping[str, Any]) -> dict[str, str]:
    """Return name and version of each installed package that the project needs, directly or not, but for development.

    project: the table `project` of pyproject.toml.
    """
    extras = [texts for name, texts in project["optional-dependencies"].items() if name not in LEFT_OUT]
    left = list(requirements([*project["dependencies"], *(text for texts in extras for text in texts)]))
    versions: dict[str, str] = {}
    seen = set()
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if (key := (name, frozenset(requirement.extras))) in seen:
            continue
        seen.add(key)
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of an extra that is not installed here
        versions[name] = Version(found.version).public
        left += requirements(found.requires or (), requirement.extras)
    return versions


def main() -> None:
    """Write the file from this environment."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [f"{name}=={version}\n" for name, version in sorted(installed(project).items())]
    FILE.write_text(HEADING.format(python=platform.python_version()) + "".join(lines), encoding="utf-8")
    sys.stdout.write(f"{FILE.relative_to(ROOT)}: {len(lines)} packages\n")


if __name__ == "__main__":
    main()

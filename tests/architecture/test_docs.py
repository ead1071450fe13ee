"""The pages name existing files, metrics, configuration keys, make targets, and commands that parse."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

import rlhf
from rlhf.algorithms import ALGORITHMS
from rlhf.cli import parse_arguments
from rlhf.config.files.base_file import read_tree
from rlhf.config.files.recipes import PREFIX, config_file
from rlhf.config.files.sweep import load_sweep
from rlhf.config.mistakes.synonyms import table
from rlhf.config.schema.evaluate import EvaluationStage
from rlhf.config.schema.merge import MergeFile
from rlhf.config.schema.root import Config
from rlhf.config.schema.sweep import SweepFile
from rlhf.sweeps.space import known_trials
from rlhf.tracking.metrics.declarations import METRICS, is_declared

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
HAND_WRITTEN = [page for page in PAGES if page.name not in ("configuration.md", "metrics.md")]
MODULE = re.compile(r"(?<![\w./-])(?:rlhf|actors)(?:\.[a-z]\w*)+")
OTHER_NAMES = {"rlhf.environments", "rlhf.trackers", "rlhf.algorithms.ranked"}  # groups of entry points, an example
OTHER_KEYS = {"coming_from.md", "python.md"}  # pages with keys of other frameworks, and with the attributes of `run`
FILE = re.compile(r"(?:rlhf|actors|tests|configs|benchmarks|docs)/[\w./-]*")


def quoted(page: Path) -> set[str]:
    """Return the texts between single backticks on a line."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return set(re.findall(r"`([^`\n]+)`", text))


def written_by(page: Path) -> set[str]:
    """Return the files to be written by the reader."""
    return set(re.findall(r"Write\s+`([^`]+)`:", page.read_text(encoding="utf-8")))


def commands(page: Path) -> Iterator[str]:
    """Return the shell lines of the page: lines of indented and fenced blocks, and quoted commands."""
    text = page.read_text(encoding="utf-8")
    fenced = [line for block in re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    for line in (*fenced, *(line for line in text.splitlines() if line.startswith(" "))):
        if re.match(r"\s*((?:\.venv/bin/)?rlhf|ray job submit|make) [^|]*", line):
            yield line.split("#")[0].strip()
    yield from (text for text in quoted(page) if re.match(r"make [a-z]|rlhf [a-z]+ \S", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    named = [text for text in quoted(page) if FILE.fullmatch(text) and "NAME" not in text]
    named = [text for text in named if text not in written_by(page)]
    metrics = {name for name in named if is_declared(name)}
    missing += [text for text in named if text not in metrics and not (ROOT / text).exists()]
    assert not missing


def is_in_product(name: str) -> bool:
    """Return whether a dotted name is a module, or a name inside a module."""
    place = ROOT
    for part in name.split("."):
        if (place / part).is_dir():
            place /= part
        elif (place / f"{part}.py").is_file():
            place /= f"{part}.py"
        else:
            file = place if place.suffix else place / "__init__.py"
            return re.search(rf"\b{part}\b", file.read_text(encoding="utf-8")) is not None
    return True


def test_modules_exist_where_the_product_and_the_pages_name_them() -> None:
    files = [*PAGES, *(path for top in ("rlhf", "actors") for path in (ROOT / top).rglob("*.py"))]
    named = {name for file in files for name in MODULE.findall(file.read_text(encoding="utf-8"))}
    assert {name for name in named if not is_in_product(name)} == OTHER_NAMES


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=lambda page: page.name)
def test_metrics_are_declared(page: Path) -> None:
    stages = {name.split("/")[0] for name in METRICS}
    names = {t for t in quoted(page) if re.fullmatch(r"[a-z_]+(/\w+)+", t) and t.split("/")[0] in stages}
    assert not {name for name in names if not is_declared(name)}


def has_key(section: object, key: list[str]) -> bool:
    """Return whether the schema has the key below this annotation."""
    if not key:
        return True
    if isinstance(section, type) and issubclass(section, BaseModel):
        field = section.model_fields.get(key[0])
        return field is not None and has_key(field.annotation, key[1:])
    return any(has_key(part, key) for part in get_args(section))


@pytest.mark.parametrize("page", [p for p in HAND_WRITTEN if p.name not in OTHER_KEYS], ids=lambda page: page.name)
def test_configuration_keys_exist(page: Path) -> None:
    words = {re.split(r"[=: ]", text)[0] for text in quoted(page)}
    files = (".py", ".md", ".json", ".jsonl", ".yaml", ".yml")
    keys = [word for word in words if "." in word and not word.endswith(files)]
    roots = {section: root for root in (EvaluationStage, MergeFile, SweepFile, Config) for section in root.model_fields}
    keys = [key for key in keys if key.split(".")[0] in roots]
    assert not [key for key in keys if not has_key(roots[key.split(".")[0]], key.split("."))]


@pytest.mark.parametrize("page", HAND_WRITTEN, ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for command in commands(page):
        words = shlex.split(command)
        if words[0] == "make":
            assert words[1] in targets, command
            continue
        if words[0] == "ray":
            words = words[words.index("--") + 1 :]
        args = parse_arguments(words[1:])
        config = getattr(args, "config", None)
        if config is not None and config != "CONFIG":
            if config in written_by(page):
                continue
            file = config_file(config) if config.startswith(PREFIX) else ROOT / config
            loads = {"merge": rlhf.load_merge, "sweep": load_sweep, "tinker": rlhf.load_service}
            of_sweep = args.command == "plan" and "sweep" in read_tree(file).values
            loads.get("sweep" if of_sweep else args.command, rlhf.load_config)(file, args.overrides)


def test_the_sweep_of_its_page_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(sweep:.*?)```", page, re.DOTALL)
    (tmp_path / "sweep.yaml").write_text(block, encoding="utf-8")
    trials = known_trials(load_sweep(tmp_path / "sweep.yaml"))
    assert len(trials or ()) == 12


def test_every_algorithm_says_what_to_watch_and_how_it_fails() -> None:
    page = (ROOT / "docs" / "algorithms.md").read_text(encoding="utf-8")
    sections = re.split(r"\n#{2,3} ", page)
    recipes = {read_tree(path).values.get("algorithm", {}).get("name") for path in (ROOT / "configs").glob("*.yaml")}
    assert ALGORITHMS.keys() <= recipes
    for name, algorithm in ALGORITHMS.items():
        file = f"`{algorithm.__module__.replace('.', '/')}.py`"
        (section,) = [text for text in sections if file in text]
        assert "Watch: " in section, name
        _, found, failures = section.partition("Known failure")
        assert found, name
        shared = len(set(re.findall(r"`rlhf/algorithms/\w+\.py`", section))) > 1
        assert not shared or re.search(rf"\b{name}\b", failures), name


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 115
    assert len(readme.split()) <= 900
    assert all(link in readme for link in ("(docs/README.md)", "(CONTRIBUTING.md)"))
    text = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- \[.+\]\((\w+\.md)\): .+\.$", text, flags=re.MULTILINE)
    assert sorted([*listed, "README.md"]) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_ci_runs_the_first_commands_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first = re.findall(r"^    (\S.*)$", readme, flags=re.MULTILINE)[:2]
    assert first == ["make quickstart", "make test"]
    run = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line for line in run if line.startswith("make ")][:2] == first


def test_the_readme_installs_the_wheel_of_this_version() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert re.findall(r"^    (?:uv )?pip install '([^[']+)", readme, flags=re.MULTILINE) == [
        f"dist/ray_rlhf-{version}-py3-none-any.whl"
    ]


def test_the_page_on_python_names_every_call() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert not [name for name in rlhf.__all__ if f"rlhf.{name}" not in page]


def test_the_settings_of_other_frameworks_are_those_of_the_error_messages() -> None:
    text = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
    assert text.endswith(table()), "replace the table by the output of: python -m rlhf.config.mistakes.synonyms"

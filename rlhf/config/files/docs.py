"""Write docs/configuration.md from the schema: `python -m rlhf.config.files.docs > docs/configuration.md`.

The prose is in docs.md. The text of the keys comes from the docstrings of the sections and their fields.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import get_args, get_origin

from pydantic.fields import FieldInfo

from rlhf.config.mistakes.explain import expected
from rlhf.config.mistakes.schema_keys import is_section, members
from rlhf.config.schema.data import SOURCES
from rlhf.config.schema.evaluate import EvaluationStage
from rlhf.config.schema.merge import MergeFile
from rlhf.config.schema.root import Config
from rlhf.config.schema.service import TinkerConfig
from rlhf.config.schema.sweep import SweepFile
from rlhf.sections import Section

TEXT = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")  # with {places} for what follows from the schema


def configuration_page() -> str:
    page = _Page()
    document(EvaluationStage)
    document(TinkerConfig)
    keys = {
        "Config": page.sections(Config),
        "MergeFile": page.sections(MergeFile),
        "EvaluationStage.evaluate": page.keys("evaluate", EvaluationStage.model_fields["evaluate"]),
        "SweepFile": page.sections(SweepFile),
        "TinkerConfig.service": page.keys("service", TinkerConfig.model_fields["service"]),
    }
    text = TEXT
    for name, section in keys.items():
        text = text.replace(f"{{keys of {name}}}", section.strip("\n"))
    return text.replace("{contents}", _contents(text))


class _Page:
    """Write the sections of the schema. Each class is described once, and later keys link to the description."""

    def __init__(self) -> None:
        self.titles: dict[type[Section], str] = {}  # classes already described, or scheduled to be described

    def sections(self, root: type[Section]) -> str:
        document(root)
        return "".join(self.keys(name, field) for name, field in root.model_fields.items())

    def keys(self, path: str, field: FieldInfo, owner: str = "") -> str:
        """Describe the new classes at and below a key. `owner`: the algorithm or method whose section has the key."""
        places: dict[type[Section], str] = {}
        for at, section in _sections(path, field):
            places.setdefault(section, at)
        new = [(at, section) for section, at in places.items() if section not in self.titles]
        self.titles |= {section: _title(at, section, owner) for at, section in new}
        return "".join(self._section(at, section, field, _name(section, at) or owner) for at, section in new)

    def _section(self, path: str, section: type[Section], field: FieldInfo, owner: str) -> str:
        document(section)
        text = f"\n### {self.titles[section]}\n\n{_line(section.__doc__ or '')}"
        text += f" {_line(field.description or '')}\n\n" if field.default is None else "\n\n"
        text += "| key | values | default | meaning |\n|---|---|---|---|\n"
        below = ""
        # the name of a form comes first, then required keys
        order = sorted(section.model_fields.items(), key=lambda item: (item[0] != "name", not item[1].is_required()))
        for name, member in order:
            below += self.keys(f"{path}.{name}", member, owner)
            cells = (f"`{name}`", _cell(expected(member)), _default(member), self._meaning(member))
            text += f"| {' | '.join(cells)} |\n"
        return text + below

    def _meaning(self, field: FieldInfo) -> str:
        links = [f"[{self.titles[section]}](#{slug(self.titles[section])})" for _, section in _sections("", field)]
        return _cell(field.description or "") + (f" Keys: {', '.join(dict.fromkeys(links))}." if links else "")


def document(section: type[Section]) -> None:
    """Describe each field by the string under the field, in the class or else in a base class. pydantic's option for
    such strings would read all files of the schema at the start of every command."""
    texts: dict[str, str] = {}
    for base in reversed(section.__mro__):
        if issubclass(base, Section):
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            assert isinstance(tree, ast.ClassDef)
            for pair in pairwise(tree.body):
                match pair:
                    case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                        texts[name] = inspect.cleandoc(text)
    for name, info in section.model_fields.items():
        info.description = texts.get(name)


def slug(title: str) -> str:
    """Return GitHub's anchor of a heading."""
    return "".join(c for c in title.lower() if c.isalnum() or c in " -_").replace(" ", "-")


def _name(section: type[Section], path: str) -> str:
    """Return the `name` that selects a section among the forms of its key, or an empty string for a single form."""
    if path not in ("algorithm", "sweep.method"):
        return ""
    return str(get_args(section.model_fields["name"].annotation)[0])


def _title(path: str, section: type[Section], owner: str) -> str:
    if name := _name(section, path):
        return f"`{path}` with `name: {name}`"
    if mark := next((mark for mark, form in SOURCES.items() if form is section), None):
        return f"`{path}` with `{mark}`"
    return f"`{path}` of `{owner}`" if owner else f"`{path}`"


def _contents(text: str) -> str:
    lines: list[str] = []
    for level, title in re.findall(r"^(##+) (.+)$", text, re.MULTILINE):
        path, _, name = title.partition(" with ")
        if level == "##":
            lines.append(f"- [{title}](#{slug(title)})")
        elif name:
            link = f"[{name.removeprefix('`name: ').strip('`')}](#{slug(title)})"
            start = f"  - {path}: "
            lines[-1:] = [f"{lines[-1]}, {link}"] if lines[-1].startswith(start) else [lines[-1], f"{start}{link}"]
        elif "." not in path.removesuffix(".NAME`"):
            lines.append(f"  - [{title}](#{slug(title)})")
    return "\n".join(lines) + "\n"


def _sections(path: str, field: FieldInfo) -> Iterator[tuple[str, type[Section]]]:
    """Yield the possible classes of a key with their paths: `NAME` is chosen by the user, `N` a place in a list."""
    for member in members(field.annotation):
        if get_origin(member) is tuple and is_section(get_args(member)[0]):
            yield f"{path}.N", get_args(member)[0]
        named = get_origin(member) is dict
        for inner in members(get_args(member)[1]) if named else [member]:
            if is_section(inner):
                yield f"{path}.NAME" if named else path, inner
                break


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, Section):
        changed = {name: getattr(value, name) for name in type(value).model_fields if name in value.model_fields_set}
        return _cell(f"`{json.dumps(changed)}`") if changed else "its defaults"
    plain = isinstance(value, Path) or (isinstance(value, str) and value.isprintable())
    return f"`{value}`" if plain else f"`{json.dumps(value)}`"


def _line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(configuration_page())

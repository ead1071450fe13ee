"""Explain in words why a text is not valid YAML, for readers without knowledge of parsers. Nothing is parsed here."""

from __future__ import annotations

import re

import yaml

_NO_ANCHOR = "`*` starts a reference to an anchor, and there is no such anchor. Put the text in quotes."
# The start of a problem, or the start or end of its context, and the explanation.
_REASONS = {
    "found undefined alias": _NO_ANCHOR,
    "an alias": _NO_ANCHOR,
    "found duplicate anchor": "the anchor exists already. Give each anchor a name that no other has.",
    "an anchor": "`&` starts an anchor, which needs a name. Put the text in quotes.",
    "found unknown escape": "a backslash in double quotes starts an escape (`\\n`). Use single quotes, or double it.",
    "sequence entries": "a list starts on the next line, with `- ` before each entry, or is written `[a, b]`.",
    "a block scalar": "a value that starts with `>` or `|` needs quotes.",
    "but found another document": "the file holds a second document. Remove the line `---`.",
}


def explain_yaml_error(error: yaml.MarkedYAMLError, text: str) -> tuple[int | None, str]:
    """Return the number of the line to blame, from 1, and a text with the mistake and the correction."""
    mark, opened = error.problem_mark or error.context_mark, error.context_mark
    problem, context = error.problem or error.context or "", error.context or ""
    lines = text.splitlines()
    before = "" if mark is None or mark.line >= len(lines) else lines[mark.line][: mark.column]
    opening = "" if opened is None or opened.line >= len(lines) else lines[opened.line][opened.column :][:1]
    where = f" of line {opened.line + 1}" if opened is not None and len(lines) > 1 else ""
    line = None if mark is None else mark.line + 1
    if character := re.match(r"found character '(.+)' that cannot start", problem):
        if character[1] == "\\t":
            return line, "the line is indented with a tab. Indent with spaces."
        return line, f"a value cannot start with {character[1]!r}. Put the value in quotes."
    if problem.startswith("mapping values are not allowed"):
        if ": " in before:
            return line, "there are two `: ` on the line. Put a value that contains `: ` in quotes."
        return line, "a key cannot stand here. The line above needs a `:` at its end, or the indentation of this line."
    if problem.startswith("expected <block end>, but found"):
        if problem.endswith(("'}'", "']'")):
            return line, f"the `{problem[-2]}` closes a bracket that was never opened."
        if problem.endswith("'<scalar>'"):
            what = "there is text after the end of the value"
            return line, f"{what}. Put all of it in quotes, or correct its indentation."
        return line, f"the line is indented unlike its section{where}. All keys of a section start in the same column."
    if problem.startswith(("expected ',' or '}'", "expected ',' or ']'")):
        return line, f"the `{opening}`{where} is not closed, or a comma is missing before this place."
    if problem.startswith("found unexpected end of stream"):
        return (opened.line + 1 if opened else line), "the quote that opens here is never closed."
    if problem.startswith("could not find expected ':'"):
        return (opened.line + 1 if opened else line), "the key has no `: ` behind it."
    if problem.startswith("expected the node content"):
        return line, f"a value is missing before {problem[problem.rfind('found') + 6 :].replace(chr(39), '`')}."
    for words, reason in _REASONS.items():
        if problem.startswith(words) or context.startswith(words) or context.endswith(words):
            return line, reason
    return line, f"{problem}."

"""Write the teacher's prompt of a policy that teaches itself, from a template with columns of the row.

`draft` runs once for each row, and leaves marks for texts that exist only after sampling. `complete` replaces marks. A
paragraph with such a text is left out if the response has no such text. The engines never get the result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from string import Formatter
from typing import Any

from rlhf.errors import UserError
from rlhf.types import PrivilegedDraft

PROMPT, BETTER, FEEDBACK = "prompt", "better_response", "feedback"
LATE_FIELDS = (BETTER, FEEDBACK)
_BREAK = "\n\n"
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"  # private characters around a paragraph that may be left out
_MARKS = {BETTER: "\ue0f2", FEEDBACK: "\ue0f3"}
_RESERVED = re.compile("[\ue0f0-\ue0f3]")
_OPTIONAL = re.compile(f"{_OPEN}(.*?){_CLOSE}", re.DOTALL)


def fields_of(template: str) -> tuple[str, ...]:
    """Return the names of the template's fields. ValueError for a field that is no plain name."""
    names = []
    for _, name, form, conversion in Formatter().parse(template):
        if name is None:
            continue
        if not name.isidentifier() or form or conversion:
            raise ValueError(
                f"has the field {{{name}}}, expected a column's name and nothing else; write {{{{ for a brace"
            )
        names.append(name)
    return tuple(names)


def needs_late_text(template: str) -> bool:
    """Return whether a response can be without a teacher: the template has no column of the row."""
    return not set(fields_of(template)) - {PROMPT, *LATE_FIELDS}


def draft(template: str, prompt: str, columns: Mapping[str, Any], *, place: str) -> str:
    """Return the template's text for a row, with marks for late fields. UserError for a missing column."""
    names = [name for name in fields_of(template) if name not in (PROMPT, *_MARKS)]
    values = {PROMPT: prompt} | {name: columns.get(name) for name in names}
    for name, value in values.items():
        if value is None:
            raise UserError(
                f"{place}: has no column `{name}`, which algorithm.privileged.template names. Add the column "
                "(data.columns renames columns), or change the template."
            )
        if _RESERVED.search(str(value)):
            raise UserError(f"{place}: column `{name}` has a character from U+E0F0 to U+E0F3, which marks texts here.")
    paragraphs, text = template.split(_BREAK), ""
    for index, paragraph in enumerate(paragraphs):
        filled = paragraph.format(**values, **_MARKS)
        before = _BREAK if index and not (index == 1 and is_late(paragraphs[0])) else ""
        after = "" if index else _BREAK
        text += f"{_OPEN}{before}{filled}{after}{_CLOSE}" if is_late(paragraph) else before + filled
    return text


def is_late(paragraph: str) -> bool:
    """Return whether the paragraph has a text that exists only after sampling."""
    return any(name in _MARKS for name in fields_of(paragraph))


def complete(drafted: str, *, better: str | None, feedback: str | None) -> str:
    """Return the drafted text with the texts of a response. None: the response has no such text."""
    texts = {_MARKS[BETTER]: better, _MARKS[FEEDBACK]: feedback}

    def paragraph(found: re.Match[str]) -> str:
        text = found[1]
        if any(mark in text and value is None for mark, value in texts.items()):
            return ""
        return re.sub("|".join(texts), lambda mark: texts[mark[0]] or "", text)

    return _OPTIONAL.sub(paragraph, drafted)


def token_ids_of(
    drafted: PrivilegedDraft, encode: Callable[[str], list[int]], *, better: str | None, feedback: str | None
) -> list[int]:
    """Return the tokens of a completed prompt. The longer text of a response loses its end until the prompt fits."""
    texts = {"better": better, "feedback": feedback}
    while True:
        token_ids = encode(complete(drafted.text, **texts))
        excess = len(token_ids) - drafted.max_tokens
        if excess <= 0 or not any(texts.values()):
            return token_ids
        longest = max(texts, key=lambda name: len(texts[name] or ""))
        text = texts[longest] or ""
        texts[longest] = text[: max(0, len(text) - max(excess, 1))] or None  # without its heading too

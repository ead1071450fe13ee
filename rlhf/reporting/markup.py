"""HTML from untrusted text: every value passes through `text`.

A model's text can hold tags, scripts, control characters and half surrogates. It is shown, never obeyed.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")


def text(value: object) -> str:
    """Return the value as HTML text or attribute: escaped, control and direction marks made visible."""
    escaped = _CONTROLS.sub(lambda mark: f"\\x{ord(mark[0]):02x}", str(value))
    return html.escape(escaped.encode("utf-8", "replace").decode("utf-8"))


def key(name: str) -> str:
    """Return the name of a metric or setting, with line breaks allowed between its parts."""
    return f"<code>{text(name).replace('/', '/<wbr>').replace('.', '.<wbr>').replace('_', '_<wbr>')}</code>"


def truncate(value: str, limit: int) -> str:
    """Truncate a text to `limit` characters, and state its full length."""
    return value if len(value) <= limit else f"{value[:limit]} ... ({len(value):,} characters)"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int | None = None) -> str:
    """Return a table that scrolls separately on a narrow page. Headings are text, cells are HTML already.

    numbers: the first column to align as numbers. None: align no column so.
    """
    align = [numbers is not None and index >= numbers for index in range(len(headings))]
    head = "".join(_cell("th", text(name), right) for name, right in zip(headings, align, strict=True))
    body = "".join(
        f"<tr>{''.join(_cell('td', cell, right) for cell, right in zip(row, align, strict=True))}</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(tag: str, content: str, right: bool) -> str:
    return f'<{tag} class="number">{content}</{tag}>' if right else f"<{tag}>{content}</{tag}>"


def section(title: str, content: str, *, id: str = "") -> str:
    """Return a headed part of the page, or nothing without content."""
    if not content:
        return ""
    name = f' id="{text(id)}"' if id else ""
    return f"<section{name}><h3>{text(title)}</h3>{content}</section>"


def folded(title: str, content: str, *, note: str = "", of: str = "") -> str:
    """Return a collapsed section. `of` is its CSS class."""
    label = f' <span class="dim">{text(note)}</span>' if note else ""
    return f'<details class="{text(of)}"><summary>{text(title)}{label}</summary>{content}</details>'


def embedded(value: Any) -> str:
    """Return JSON that is safe inside a script element."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")

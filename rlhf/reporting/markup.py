"""The page's template, with untrusted text made safe: control marks become visible, and everything is escaped.

A model's text can hold tags, scripts, control characters and half surrogates. The page shows such text and never obeys.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from rlhf.tracking.formatting import duration, number

STATIC = Path(__file__).with_name("static")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")


def text(value: object) -> Markup:
    """Return the value as HTML text or attribute: escaped, control and direction marks made visible.

    Markup of the template itself stays unchanged.
    """
    return value if isinstance(value, Markup) else escape(visible(str(value)))


def visible(value: str) -> str:
    """Return a text with control and direction marks made visible, and without half surrogates."""
    marked = _CONTROLS.sub(lambda mark: f"\\x{ord(mark[0]):02x}", value)
    return marked.encode("utf-8", "replace").decode("utf-8")


def page_template() -> Template:
    """Return the template of a report. Every shown value passes through `text`."""
    environment = Environment(
        loader=FileSystemLoader(STATIC),
        autoescape=True,
        finalize=text,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": _duration, "key": _key, "shorten": shorten}
    return environment.get_template("report.html")


def _key(name: str) -> Markup:
    """Return the name of a metric or setting, with line breaks allowed between the parts."""
    return Markup(f"<code>{re.sub('[/._]', lambda mark: f'{mark[0]}<wbr>', text(name))}</code>")


def _duration(seconds: float) -> str:
    return duration(seconds) if seconds >= 10 else f"{number(seconds)} s"


def shorten(value: str, limit: int) -> str:
    """Truncate a text to `limit` characters, and state the full length."""
    return value if len(value) <= limit else f"{value[:limit]} ... ({len(value):,} characters)"


def embedded(value: Any) -> str:
    """Return JSON that is safe inside a script element."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")

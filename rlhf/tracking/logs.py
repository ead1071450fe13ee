"""Log lines of the driver and the workers, one event a line, and the masking of secrets in all output of the process.

Each process calls `configure` once, before any work. Only loggers of this project change, never the root logger.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

MASK = "***"
_SECRET_NAME = re.compile(
    r"(?i)(^|.*[_.-])(api[_-]?key|access[_-]?key|secret[_-]?key|private[_-]?key|secret|password|passwd|passphrase|pwd"
    r"|credentials?|auth|authorization|cookie|(auth|access|api|hf|hub|ray|bearer|refresh|session|id|bot|personal|service"
    r"|secret|security|csrf|oauth|jwt|github|gitlab|slack|discord|telegram|wandb|openai|anthropic|azure|aws|google"
    r")[_-]?token)$|^token$"
)
_NAMED = frozenset({"stages", "rewards", "train", "eval", "data", "models"})  # sections by names that users choose
_VARIABLE = re.compile(r"\$\{[A-Za-z_][A-Za-z0-9_]*\}")
_SECRET_ENV = re.compile(r"(?i)(^|_)(TOKEN|KEY|APIKEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|AUTH|PAT)$")
_SECRET_TEXT = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bwandb_v\d_[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{16,}"
    r"|\bgithub_pat_[A-Za-z0-9_]{16,}|(?<=://)[^\s/:@]*:[^\s/@]+(?=@)|(?i:(?<=bearer )[A-Za-z0-9._~+/=-]{8,})"
)
_SECRET_QUERY = re.compile(
    r"(?i)([?&][\w.-]*(?:token|key|secret|passw(?:or)?d|passphrase|auth|sig(?:nature)?)=)[^\s&#\"']+"
)


def is_secret_name(name: str) -> bool:
    """Return whether a name such as `api_key` or `X-Auth-Token` stands for a secret."""
    return _SECRET_NAME.match(name) is not None


def redact(text: str) -> str:
    """Return the text with secrets masked: values of secret environment variables, tokens, passwords in URLs."""
    for name, value in os.environ.items():
        if len(value) >= 8 and _SECRET_ENV.search(name):
            text = text.replace(value, MASK)
    return _SECRET_QUERY.sub(rf"\1{MASK}", _SECRET_TEXT.sub(MASK, text))


def redact_config(value: Any, key: str = "") -> Any:
    """Return a copy of a config tree with secret values masked, for files and W&B.

    Everything below a secret name is masked, except booleans, zeros, empty values, and environment variables `${NAME}`.
    """
    if isinstance(value, Mapping):
        return {name: redact_config(item, _secret_key(key, str(name), item)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_config(item, key) for item in value]
    if value and not isinstance(value, bool) and is_secret_name(key) and not _VARIABLE.search(str(value)):
        return MASK
    return redact(value) if isinstance(value, str) else value


def _secret_key(section: str, name: str, item: Any) -> str:
    """Return the name for the decision whether to mask an item: the section's if secret, else the item's.

    The user chooses the names of rewards, data sets and stages. Such a name hides nothing, not even the name `secret`.
    """
    if is_secret_name(section):
        return section
    return "" if section in _NAMED and isinstance(item, Mapping) and is_secret_name(name) else name


class _Formatter(logging.Formatter):
    """Formats a record as `2026-01-31T12:00:00.000Z INFO policy/1 step=12 rlhf.workers.online.policy: message`.

    A record always takes one line. The step is left out between steps.
    """

    def __init__(self, role: str, rank: int | None) -> None:
        super().__init__()
        self.who = role if rank is None else f"{role}/{rank}"
        self.step: int | None = None

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        message = record.getMessage() + (f"\n{self.formatException(record.exc_info)}" if record.exc_info else "")
        who = self.who if self.step is None else f"{self.who} step={self.step}"
        line = f"{moment}.{int(record.msecs):03d}Z {record.levelname} {who} {record.name}: {message}"
        return printable(redact(line).replace("\n", "\\n"))


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to the current sys.stderr, to write lines above a live progress display, not through the display."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _CellHandler(_StderrHandler):
    """Shows the newest line in place until the display of a run has the place. Warnings and errors stay."""

    def emit(self, record: logging.LogRecord) -> None:
        from rlhf.tracking.notebook import PLACE

        if record.levelno >= logging.WARNING:
            super().emit(record)
        elif not PLACE.is_taken:
            from rich.text import Text

            PLACE.show(Text(printable(redact(record.getMessage())), style="dim"))


class _FileHandler(logging.Handler):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record) + "\n"
        with suppress(OSError), self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(line)  # a full disk is the run's concern, which waits for room and says so


def configure(level: str = "INFO", *, role: str = "controller", rank: int | None = None) -> None:
    """Send this project's log records to stderr in our form. A second call replaces the first.

    In a notebook only warnings and errors stay in the cell, and other lines replace each other.
    """
    from rlhf.tracking.notebook import in_notebook

    handler = _CellHandler() if in_notebook() else _StderrHandler()
    handler.setFormatter(_Formatter(role, rank))
    for name in ("rlhf", "actors"):
        logger = logging.getLogger(name)
        for old in [h for h in logger.handlers if isinstance(h, _StderrHandler)]:
            logger.removeHandler(old)
        logger.addHandler(handler)
        logger.setLevel(level.upper())
        logger.propagate = False


@contextmanager
def written_to(path: Path) -> Iterator[None]:
    """Also append the lines of this process to a file, in the form of `configure`."""
    handler = _FileHandler(path)
    loggers = [logging.getLogger(name) for name in ("rlhf", "actors")]
    shown = next((old for old in loggers[0].handlers if isinstance(old, _StderrHandler)), None)
    handler.setFormatter(_Formatter("controller", None) if shown is None else shown.formatter)
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def hush_imports() -> None:
    """Silence import-time log lines of libraries: no user can act on such a line. Called before the imports."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # reports a missing package that nothing here calls
    # A driver logs this line, although a driver needs no accelerator.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def printable(text: str) -> str:
    """Return text with control characters escaped, except line ends, so that a terminal obeys none."""
    return "".join(mark if mark.isprintable() or mark in "\n\t" else ascii(mark)[1:-1] for mark in text)


def set_step(step: int | None) -> None:
    """Set the step of later records of this process. None: no step."""
    for handler in logging.getLogger("rlhf").handlers:
        if isinstance(handler.formatter, _Formatter):
            handler.formatter.step = step

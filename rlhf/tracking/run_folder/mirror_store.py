"""The file system that `run.mirror` names, opened with fsspec."""

from __future__ import annotations

from typing import Any

import fsspec

from rlhf.errors import UserError
from rlhf.tracking.logs import redact


def open_store(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it. UserError: it is not known, or its package is missing."""
    try:
        return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
    except ImportError as error:
        raise UserError(
            f"run.mirror: {redact(url)} needs a package that is not installed: {error}. Install it with pip (s3fs for "
            "s3://, gcsfs for gs://, adlfs for abfs://)."
        ) from error
    except ValueError as error:
        raise UserError(
            f"run.mirror: {redact(url)} is no URL that fsspec knows: {redact(str(error))}. Take s3://, gs://, abfs://, "
            "or a folder."
        ) from error

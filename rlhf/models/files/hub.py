"""Test once whether the Hugging Face hub answers. The hub's libraries would retry for minutes, for every file."""

from __future__ import annotations

import logging
import os
import ssl
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from huggingface_hub import constants, try_to_load_from_cache

logger = logging.getLogger(__name__)
ANSWER_WITHIN_S = 8.0


def use_cache_if_silent() -> None:
    """Make this process and its workers use cached files if no hub answers, like HF_HUB_OFFLINE=1."""
    if constants.HF_HUB_OFFLINE:
        return
    reason = why_silent()
    if reason:
        logger.warning(
            "no hub answers at %s (%s): only files in the local cache can be used", constants.ENDPOINT, reason
        )
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"


def why_silent() -> str:
    """Return the reason for a missing answer of the hub, or "" after an answer."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=ANSWER_WITHIN_S).close()
    except OSError as error:
        reason = error.reason if isinstance(error, URLError) else error
        if not isinstance(error, HTTPError) and not isinstance(reason, ssl.SSLError):
            return str(reason)  # HTTP errors and TLS errors are answers, and the libraries may trust other certificates
    return ""


def is_cached(model: str) -> bool:
    """Return whether a hub model or adapter is in this machine's cache, with the weights."""
    from rlhf.models.files.loading import split_revision  # with transformers, which takes seconds

    repository, revision = split_revision(model)
    for name in ("config.json", "adapter_config.json"):
        cached_path = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(cached_path, str) and any(Path(cached_path).parent.glob("*.safetensors")):
            return True
    return False

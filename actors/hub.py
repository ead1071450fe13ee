"""Whether the Hugging Face hub answers, asked once: its libraries ask again for minutes, for every file.

Called before anything is loaded by name. It downloads nothing.
"""

from __future__ import annotations

import logging
import os
import ssl
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from huggingface_hub import constants

logger = logging.getLogger(__name__)
ANSWER_WITHIN_S = 8.0


def use_cache_if_silent() -> None:
    """Where no hub answers, have this process and the workers take what is cached, as HF_HUB_OFFLINE=1 does."""
    if constants.HF_HUB_OFFLINE:
        return
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=ANSWER_WITHIN_S).close()
    except HTTPError:
        return  # an answer
    except OSError as error:
        reason = error.reason if isinstance(error, URLError) else error
        if isinstance(reason, ssl.SSLError):
            return  # an answer, and the libraries may trust other certificates
        logger.warning("no hub answers at %s (%s): only what is cached of it can be used", constants.ENDPOINT, reason)
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"

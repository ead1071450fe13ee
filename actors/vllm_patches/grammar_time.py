"""Bound the processor time of a request's grammar in an engine's loop.

An ambiguous grammar, such as repetitions within repetitions, takes longer with every token, and all requests of the
engine wait for it. This module never looks at the content of a grammar.
"""

from __future__ import annotations

import time
from typing import Any

STEP_S = 0.5  # of processor time for one token; usual grammars take milliseconds


def bound_grammars() -> None:
    """Let vLLM end a request as failed once the grammar takes more than STEP_S for a token."""
    from vllm.v1.structured_output import backend_xgrammar

    if "BoundedGrammar" not in backend_xgrammar.XgrammarGrammar.__name__:
        backend_xgrammar.XgrammarGrammar = bounded(backend_xgrammar.XgrammarGrammar)


def bounded(grammar: type[Any]) -> type[Any]:
    """Return a subclass of vLLM's grammar that rejects a token after too long a time."""

    class BoundedGrammar(grammar):  # type: ignore[misc]
        mask_s = 0.0

        def fill_bitmask(self, bitmask: Any, idx: int) -> None:
            began = time.thread_time()
            super().fill_bitmask(bitmask, idx)
            self.mask_s += time.thread_time() - began

        def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
            began = time.thread_time()
            is_accepted = super().accept_tokens(request_id, tokens)
            spent_s, self.mask_s = self.mask_s + time.thread_time() - began, 0.0
            return bool(is_accepted) and spent_s <= STEP_S * len(tokens)

    return BoundedGrammar

"""A grammar with growing time ends a request, and a usual grammar does not."""

from __future__ import annotations

import itertools

import pytest
import xgrammar

from actors.vllm_patches import grammar_time
from rlhf.models.files.tiny import byte_tokenizer

pytestmark = pytest.mark.slow  # vLLM is imported

TOKENIZER = byte_tokenizer()
REPEATED = 'root ::= ((("a"{1,1000}){1,1000}){1,1000}){1,1000}'  # each `a` may end any of the repetitions


def accepted(grammar: str, text: str) -> int:
    """Return the number of characters of a text accepted by the engine's grammar, in order."""
    from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

    info = xgrammar.TokenizerInfo.from_huggingface(TOKENIZER)
    compiled = xgrammar.GrammarCompiler(info).compile_grammar(grammar)
    made = grammar_time.bounded(XgrammarGrammar)(
        vocab_size=info.vocab_size, matcher=xgrammar.GrammarMatcher(compiled), ctx=compiled
    )
    mask = xgrammar.allocate_token_bitmask(1, info.vocab_size)
    ids = TOKENIZER(text, add_special_tokens=False).input_ids

    def takes(token: int) -> bool:
        made.fill_bitmask(mask, 0)
        return bool(made.accept_tokens("r", [token]))

    return sum(1 for _ in itertools.takewhile(takes, ids))


def test_a_grammar_that_takes_ever_longer_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_time, "STEP_S", 0.02)
    assert 1 <= accepted(REPEATED, "a" * 200) < 200
    assert accepted('root ::= "a" root', "a" * 200) == 200

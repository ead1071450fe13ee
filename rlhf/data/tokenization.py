"""Turn text into token ids: whole texts, raw texts with a beginning-of-sequence token, and continuations of a text.

Prompts, examples and conversations all go through this module. SentencePiece tokenizers write a space before the first
word of a text, and some also after each special token. A continuation is therefore tokenised after a context, and the
ids of the context are removed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rlhf.errors import UserError

_ANCHORS = ("\n", "a", "0", ".", "(")  # ordinary texts; an anchor that merges with the text after the anchor is skipped
_AT_ONCE = 1000  # texts
_TAIL = 256  # characters searched for the last special token of the previous text


def encode(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the token ids of each text unchanged, without special tokens.

    Texts are encoded in small batches, since the tokenizer's intermediate records take ten times the memory of the ids.
    """
    ids: list[list[int]] = []
    for start in range(0, len(texts), _AT_ONCE):
        part = list(texts[start : start + _AT_ONCE])
        ids += tokenizer(part, add_special_tokens=False, return_attention_mask=False).input_ids
    return ids


def encode_raw(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the token ids of texts not written by a template.

    If the tokenizer uses a beginning-of-sequence token, the ids begin with exactly one, even if the text has one.
    """
    bos = raw_beginning(tokenizer)
    encoded = encode([text.removeprefix(bos) for text in texts], tokenizer)
    return [[tokenizer.bos_token_id, *ids] for ids in encoded] if bos else encoded


def raw_beginning(tokenizer: Any) -> str:
    """Return the beginning-of-sequence token the tokenizer puts before a raw text, or an empty string."""
    bos = tokenizer.bos_token_id
    return tokenizer.bos_token if bos is not None and tokenizer("a").input_ids[0] == bos else ""


def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern for every special or added token, longer tokens first."""
    names = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)")


class Continuation:
    """Tokenises texts as continuations of earlier texts. No token spans the boundary between the two texts.

    The ids are the same as within the whole text if the tokenizer puts a boundary there too.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._special = special_tokens(tokenizer)
        self._swallows_space = {token.content for token in tokenizer.added_tokens_decoder.values() if token.rstrip}
        alone, *anchored = encode(["b", *(anchor + "b" for anchor in _ANCHORS)], tokenizer)
        after_anchor = next((ids for ids in anchored if ids != alone), alone)
        self._marks_beginning = after_anchor[-len(alone) :] != alone

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Return the ids of each pair's second text after the first. UserError if the tokenizer joins the texts."""
        contexts = [self._context(before) for before, _ in pairs]
        continued: dict[int, list[int]] = {}
        for anchor in _ANCHORS:
            missing = [index for index in range(len(pairs)) if index not in continued]
            heads = [anchor if (context := contexts[index]) is None else context for index in missing]
            distinct = list(dict.fromkeys(heads))
            head_ids = dict(zip(distinct, encode(distinct, self.tokenizer), strict=True))
            whole = encode([head + pairs[index][1] for head, index in zip(heads, missing, strict=True)], self.tokenizer)
            for index, head, ids in zip(missing, heads, whole, strict=True):
                before = head_ids[head]
                if ids[: len(before)] == before and bool(before) == bool(head):
                    continued[index] = ids[len(before) :]
        if len(continued) < len(pairs):
            text = next(text for index, (_, text) in enumerate(pairs) if index not in continued)
            raise UserError(
                f"The tokenizer of {self.tokenizer.name_or_path} joins {text!r:.60} with the text before it, so this "
                "text has no tokens of its own. Use another model."
            )
        return [continued[index] for index in range(len(pairs))]

    def _context(self, before: str) -> str | None:
        """Return the context of a continuation: the special token at the end of the text before, or an empty string.

        None stands for any ordinary text.
        """
        tail = before[-_TAIL:]
        for last in [*self._special.finditer(tail)][-1:]:
            rest = tail[last.end() :]
            if not rest or (rest.isspace() and last.group() in self._swallows_space):
                return tail[last.start() :]
        return None if self._marks_beginning else ""

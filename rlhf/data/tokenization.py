"""Text as token ids: whole texts, raw texts with a beginning-of-sequence token, and texts that continue another one.

Prompts, examples and conversations all go through here. SentencePiece's kinds of tokenizers write a space before the
first word of a text, some before the first word behind each special token too. A text that continues another one is
therefore tokenised behind a context, whose ids are taken off again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rlhf.errors import UserError

_ANCHORS = ("\n", "a", "0", ".", "(")  # ordinary texts; one that merges with the text behind it is passed over
_AT_ONCE = 1000  # texts
_TAIL = 256  # characters of the text before, among which its last special token is looked for


def encode(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the token ids of each text as it stands, without special tokens.

    Few texts go to the tokenizer at once, since its own records of a text take ten times the memory of the ids.
    """
    ids: list[list[int]] = []
    for start in range(0, len(texts), _AT_ONCE):
        part = list(texts[start : start + _AT_ONCE])
        ids += tokenizer(part, add_special_tokens=False, return_attention_mask=False).input_ids
    return ids


def encode_raw(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return the token ids of texts that no template wrote: the beginning-of-sequence token, if the tokenizer uses
    one, and those of the text alone. A text that begins with that token gets no second one."""
    bos = raw_beginning(tokenizer)
    if not bos:
        return encode(texts, tokenizer)
    encoded = encode([text.removeprefix(bos) for text in texts], tokenizer)
    return [[tokenizer.bos_token_id, *ids] for ids in encoded]


def raw_beginning(tokenizer: Any) -> str:
    """Return the beginning-of-sequence token that the tokenizer puts before a raw text; empty: it puts none there."""
    bos = tokenizer.bos_token_id
    return tokenizer.bos_token if bos is not None and tokenizer("a").input_ids[0] == bos else ""


def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern that matches each special or added token, longer ones first."""
    names = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)")


class Continuation:
    """Tokenises texts as continuations of other texts. No token spans the boundary between the two.

    The ids are those that the text has within the whole text, wherever the tokenizer puts a boundary there too.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._special = special_tokens(tokenizer)
        self._swallows_space = {token.content for token in tokenizer.added_tokens_decoder.values() if token.rstrip}
        alone, *behind = encode(["b", *(anchor + "b" for anchor in _ANCHORS)], tokenizer)
        behind_anchor = next((ids for ids in behind if ids != alone), alone)
        self._marks_beginning = behind_anchor[-len(alone) :] != alone

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Return the token ids of each pair's second text behind its first. UserError if the tokenizer always joins
        the two."""
        contexts = [self._context(before) for before, _ in pairs]
        found: dict[int, list[int]] = {}
        for anchor in _ANCHORS:
            missing = [index for index in range(len(pairs)) if index not in found]
            if not missing:
                break
            heads = [anchor if contexts[index] is None else str(contexts[index]) for index in missing]
            distinct = list(dict.fromkeys(heads))
            head_ids = dict(zip(distinct, encode(distinct, self.tokenizer), strict=True))
            whole = encode([head + pairs[index][1] for head, index in zip(heads, missing, strict=True)], self.tokenizer)
            for index, head, ids in zip(missing, heads, whole, strict=True):
                before = head_ids[head]
                if ids[: len(before)] == before and bool(before) == bool(head):
                    found[index] = ids[len(before) :]
        if len(found) < len(pairs):
            text = next(text for index, (_, text) in enumerate(pairs) if index not in found)
            raise UserError(
                f"The tokenizer of {self.tokenizer.name_or_path} has no tokens for {text!r:.60} that continue another "
                "text: it joins the two. Use another model."
            )
        return [found[index] for index in range(len(pairs))]

    def _context(self, before: str) -> str | None:
        """Return what the tokenizer must see before a continuation: the special token that ends the text before, or
        nothing. None: an ordinary text, whichever."""
        tail = before[-_TAIL:]
        last = None
        for match in self._special.finditer(tail):
            last = match
        if last is not None:
            rest = tail[last.end() :]
            if not rest or (rest.isspace() and last.group() in self._swallows_space):
                return tail[last.start() :]
        return None if self._marks_beginning else ""

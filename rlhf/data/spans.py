"""Write texts of a student in the tokens of a teacher with another tokenizer, and match the tokens of both.

Both tokenizers end a token at the end of a span, and nowhere before inside the span. Positions are bytes, because a
token may end inside a character. Special tokens have no bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rlhf.data.chat import turn_end
from rlhf.data.tokenization import Continuation
from rlhf.errors import UserError

_PROBES = (" Ein Wörterbuch: 日本語, 🙂!", "\n\n  x = 12\t'a'\n", "THE end  of\u00a0it")
_CONTEXT = 16  # tokens of a prompt that are decoded to continue the prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Tokens [start, stop) of the student and of the teacher over the same bytes, each counted from the first token."""

    student: tuple[int, int]
    teacher: tuple[int, int]

    def moved(self, student: int, teacher: int) -> Span:
        """Return the span with larger numbers of the tokens."""
        (first, stop), (other_first, other_stop) = self.student, self.teacher
        return Span(student=(first + student, stop + student), teacher=(other_first + teacher, other_stop + teacher))


def matched_spans(student_ends: Sequence[int], teacher_ends: Sequence[int]) -> list[Span]:
    """Return the spans of two divisions of a text, in order.

    `*_ends` are the ends of the tokens, not decreasing. The tokens after the last common position are in
    no span. Source: GOLD, as in TRL 1.16, `ULDLoss._align_by_byte_offsets`.
    """
    spans, i, j, first_i, first_j = [], 0, 0, 0, 0
    while i < len(student_ends) and j < len(teacher_ends):
        difference = student_ends[i] - teacher_ends[j]
        i, j = i + (difference <= 0), j + (difference >= 0)
        if not difference:
            spans.append(Span(student=(first_i, i), teacher=(first_j, j)))
            first_i, first_j = i, j
    return spans


def byte_letters() -> list[str]:
    """Return ByteLevel's letter for each byte: the byte itself if printable, else the next free character from 256."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    free = iter(range(256, 512))
    return [chr(byte if byte in printable else next(free)) for byte in range(256)]


_BYTE_OF_LETTER = {letter: byte for byte, letter in enumerate(byte_letters())}


def _byte_level(word: str) -> bytes:
    return bytes(_BYTE_OF_LETTER[letter] for letter in word)


def _sentence_piece(word: str) -> bytes:
    if len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
        return bytes.fromhex(word[3:5])
    return word.replace("\u2581", " ").encode()


def token_bytes(tokenizer: Any) -> list[bytes]:
    """Return the bytes of each token id; none for special tokens. UserError if the bytes of tokens form no text."""
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    words: dict[str, int] = tokenizer.get_vocab()
    (*probes,) = Continuation(tokenizer).encode([("", probe) for probe in _PROBES])
    readings: tuple[Callable[[str], bytes], ...] = (_byte_level, _sentence_piece)
    for read in readings:
        table = [b""] * (max(words.values()) + 1)
        try:
            for word, i in words.items():
                table[i] = b"" if i in special else added[i].content.encode() if i in added else read(word)
        except (KeyError, ValueError):  # a letter or number of no byte
            continue
        if all(b"".join(table[i] for i in ids) == probe.encode() for ids, probe in zip(probes, _PROBES, strict=True)):
            return table
    raise UserError(
        f"the tokens of {tokenizer.name_or_path} do not have the bytes of the text that they stand for (the tokenizer "
        "changes the text, or has no tokens for some characters), so they cannot be compared with the tokens of "
        "another tokenizer. Use models with byte-level or SentencePiece tokenizers, or with the same tokenizer."
    )


def words_of(tokenizer: Any) -> dict[str, int]:
    """Return the tokens without a pure padding token. Training often adds such a token, and no sequence contains it."""
    words: dict[str, int] = tokenizer.get_vocab()
    if tokenizer.pad_token != tokenizer.eos_token:
        words.pop(tokenizer.pad_token, None)
    return words


def maps_alike(student: Any, teacher: Any) -> bool:
    """Return whether two tokenizers have the same tokens with the same ids."""
    words, others = student.get_vocab(), teacher.get_vocab()
    return bool(words_of(student).items() <= others.items() and words_of(teacher).items() <= words.items())


class Translator:
    """Knows the tokenizers of a student and of a teacher.

    Invariant: two different texts are compared up to the first difference.
    """

    def __init__(self, student: Any, teacher: Any, *, max_tokens: int) -> None:
        """Create the translator. max_tokens: a sequence of the teacher has no more. UserError: tokens without bytes."""
        self.teacher, self.max_tokens = teacher, max_tokens
        self._bytes, self._teacher_bytes = token_bytes(student), token_bytes(teacher)
        self._ends = [
            (student.eos_token_id, teacher.eos_token_id),
            (turn_end(student), turn_end(teacher)),
        ]
        self._continuation = Continuation(teacher)

    @property
    def teacher_turn_end(self) -> int:
        """Return the teacher's token for the end of an answer in a conversation."""
        _, (_, end) = self._ends
        return int(self.teacher.eos_token_id if end is None else end)

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """Return the ids (student's, teacher's) of the tokens with the same bytes, and of the ends, in order.

        The first token with the same bytes counts. No id occurs twice.
        """
        first = {table: i for i, table in reversed([*enumerate(self._bytes)]) if table}
        theirs = {table: i for i, table in reversed([*enumerate(self._teacher_bytes)]) if table}
        same = [(i, theirs[table]) for table, i in first.items() if table in theirs]
        of_ends: dict[int, int] = {}
        for ours, other in reversed(self._ends):
            if ours is not None and other is not None and other not in of_ends.values():
                of_ends.setdefault(ours, other)
        known, others = {i for i, _ in same}, {i for _, i in same}
        return sorted([*same, *((i, j) for i, j in of_ends.items() if i not in known and j not in others)])

    def responses(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], ends: Sequence[int]
    ) -> list[tuple[list[int], list[bool]]]:
        """Return each prompt, in the teacher's tokens, with the student's response, and the mask of the response.

        A response is written up to the first bytes outside UTF-8. The token of `ends` replaces a special token at the
        end of a whole response. A sequence has at most `max_tokens`.
        """
        texts = [self._text(response) for response in responses]
        befores = [self.teacher.decode(prompt[-_CONTEXT:], skip_special_tokens=False) for prompt in prompts]
        pairs = [(before, text) for before, (text, _) in zip(befores, texts, strict=True)]
        written = iter(self._continuation.encode([pair for pair in pairs if pair[1]]))
        sequences = []
        for prompt, (text, is_ended), end in zip(prompts, texts, ends, strict=True):
            response = [*(next(written) if text else []), *([end] if is_ended else [])]
            ids, mask = [*prompt, *response], [False] * len(prompt) + [True] * len(response)
            sequences.append((ids[: self.max_tokens], mask[: self.max_tokens]))
        return sequences

    def _text(self, response: Sequence[int]) -> tuple[str, bool]:
        """Return the text of sampled tokens, and whether the whole response is text before a special token."""
        data = b"".join(map(self._of_student, response))
        try:
            return data.decode(), bool(response) and not self._of_student(response[-1])
        except UnicodeDecodeError as error:
            return data[: error.start].decode(), False

    def _of_student(self, token_id: int) -> bytes:
        """Return the bytes of a token, or none for a row of the head without a token."""
        return self._bytes[token_id] if token_id < len(self._bytes) else b""

    def spans(
        self, token_ids: Sequence[int], mask: Sequence[bool], teacher_ids: Sequence[int], teacher_mask: Sequence[bool]
    ) -> list[Span]:
        """Return the spans of two sequences, in order. The tokens are counted within the masks.

        A range of adjacent tokens in the mask has the same text in both sequences. A span with a special token inside
        is left out. Special tokens at both ends of a range are a span.
        """
        spans, ours, theirs = [], 0, 0
        for (start, stop), (first, last) in zip(_ranges(mask), _ranges(teacher_mask), strict=False):
            whole = start == first == 1  # in a text without a prompt, the first token is outside the mask
            student = [self._of_student(i) for i in token_ids[start - whole : stop]]
            teacher = [self._teacher_bytes[i] for i in teacher_ids[first - whole : last]]
            spans += [span.moved(ours - whole, theirs - whole) for span in _within(student, teacher, skip=int(whole))]
            ours, theirs = ours + stop - start, theirs + last - first
        return spans


def _within(student: Sequence[bytes], teacher: Sequence[bytes], *, skip: int) -> Iterable[Span]:
    """Yield the spans of two ranges of tokens, without the first `skip` tokens of each."""
    is_ended = len(student) > skip and len(teacher) > skip and not student[-1] and not teacher[-1]
    ours, theirs = (student[:-1], teacher[:-1]) if is_ended else (student, teacher)
    text, other = b"".join(ours), b"".join(theirs)
    common = (
        len(text)
        if text == other
        else next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    )
    ends, other_ends = ([*itertools.accumulate(map(len, tokens))] for tokens in (ours, theirs))
    for span in matched_spans(ends, other_ends):
        (start, stop), (first, last) = span.student, span.teacher
        if ends[stop - 1] > common:
            return
        if min(start, first) >= skip and all(ours[start:stop]) and all(theirs[first:last]):
            yield span
    if is_ended and text == other:
        yield Span(student=(len(ours), len(student)), teacher=(len(theirs), len(teacher)))


def _ranges(mask: Sequence[bool]) -> list[tuple[int, int]]:
    """Return [start, stop) of each range of adjacent tokens in the mask."""
    ranges, start = [], 0
    for value, group in itertools.groupby(mask):
        stop = start + sum(1 for _ in group)
        if value:
            ranges.append((start, stop))
        start = stop
    return ranges


def num_ranges(mask: Sequence[bool]) -> int:
    """Return the number of ranges of adjacent tokens in a mask."""
    return len(_ranges(mask))

"""rlhf/data/spans.py: the bytes of tokens, the spans of two tokenizers, and texts in a teacher's tokens."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from rlhf.data.spans import Span, Translator, maps_alike, matched_spans, num_ranges, token_bytes
from rlhf.errors import UserError
from rlhf.models.files.tiny import byte_tokenizer
from tests.fixtures.other_tokenizer import merging_tokenizer

STUDENT, TEACHER = byte_tokenizer(), merging_tokenizer()
EOS, END = STUDENT.eos_token_id, TEACHER.eos_token_id
PROMPT = TEACHER("[role]assistant: ").input_ids


def span(student: tuple[int, int], teacher: tuple[int, int]) -> Span:
    return Span(student=student, teacher=teacher)


def pieces(*, lower: bool = False) -> Any:
    """Return a tokenizer with SentencePiece's letters: a low line for a space, and tokens for bytes."""
    words = ["</s>", "\u2581", "a", "b", "\u2581ab", "ab", "Ö", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("a", "b"), ("\u2581", "ab")]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token=None))
    steps = [normalizers.Replace(" ", "\u2581")]
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps] if lower else steps)
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def spans_of(response: list[int], *, max_tokens: int = 100) -> tuple[list[Span], list[int]]:
    """Return the spans of sampled tokens after two tokens of a prompt, and the teacher's tokens of the response."""
    translator = Translator(STUDENT, TEACHER, max_tokens=max_tokens)
    ((ids, mask),) = translator.responses([PROMPT], [response], [END])
    assert len(ids) == len(mask) <= max_tokens
    assert ids[: len(PROMPT)] == PROMPT[:max_tokens]
    assert not any(mask[: len(PROMPT)])
    of_student = [False, False, *(True for _ in response)]
    return translator.spans([7, 8, *response], of_student, ids, mask), ids[len(PROMPT) :]


def test_a_span_ends_where_both_end_a_token() -> None:
    # the ends 3 and 7 are common; the student's last token, and the teacher's last two, have no partner
    assert matched_spans([1, 3, 4, 7, 8], [3, 5, 7, 9, 9]) == [span((0, 2), (0, 1)), span((2, 4), (1, 3))]
    assert matched_spans([], [1]) == []


def test_tokens_have_the_bytes_of_their_text() -> None:
    table = token_bytes(TEACHER)
    assert [table[i] for i in TEACHER("the ö🙂").input_ids] == [
        b"the",
        b" ",
        "ö".encode(),
        b"\xf0\x9f",
        b"\x99",
        b"\x82",
    ]
    assert (table[END], table[TEACHER.convert_tokens_to_ids("[role]")]) == (b"", b"")
    table = token_bytes(pieces())
    assert [table[i] for i in pieces()(" abÖ🙂").input_ids] == [
        b" ab",
        "Ö".encode(),
        b"\xf0",
        b"\x9f",
        b"\x99",
        b"\x82",
    ]


def test_a_tokenizer_that_changes_the_text_is_refused() -> None:
    with pytest.raises(UserError, match="do not have the bytes of the text"):
        token_bytes(pieces(lower=True))


def test_a_text_is_compared_at_the_common_ends_of_bytes() -> None:
    found, ids = spans_of([*STUDENT("abcd").input_ids, EOS])
    assert TEACHER.convert_ids_to_tokens(ids) == ["abc", "d", "[end]"]
    assert found == [span((0, 3), (0, 1)), span((3, 4), (1, 2)), span((4, 5), (2, 3))]


def test_a_span_may_end_inside_a_character() -> None:
    found, ids = spans_of(STUDENT("ö🙂").input_ids)  # of 2 and 4 bytes, each a token of the student
    assert len(ids) == 4
    assert found == [span((0, 2), (0, 1)), span((2, 4), (1, 2)), span((4, 5), (2, 3)), span((5, 6), (3, 4))]


def test_a_response_is_compared_up_to_bytes_that_are_no_text() -> None:
    cut = STUDENT("a🙂").input_ids[:3]  # the emoji lacks its last two bytes
    assert spans_of(cut) == ([span((0, 1), (0, 1))], TEACHER("a").input_ids)
    assert spans_of([0xFF, *STUDENT("a").input_ids, EOS]) == ([], [])
    assert spans_of([]) == ([], [])


@pytest.mark.parametrize("special", [STUDENT.convert_tokens_to_ids("<|user|>"), 5000])
def test_a_token_without_text_inside_a_response_is_not_compared(special: int) -> None:
    found, ids = spans_of([*STUDENT("x").input_ids, special, *STUDENT("yz").input_ids, EOS])
    assert TEACHER.convert_ids_to_tokens(ids) == ["x", "y", "z", "[end]"]
    # y follows a token that the teacher does not see, and shares its span
    assert found == [span((0, 1), (0, 1)), span((3, 4), (2, 3)), span((4, 5), (3, 4))]


def test_the_name_of_a_teachers_special_token_ends_the_comparison() -> None:
    found, ids = spans_of([*STUDENT("a[end]b").input_ids, EOS])
    assert ids == TEACHER("a[end]b[end]").input_ids
    assert found == [span((0, 1), (0, 1))]


def test_different_texts_are_compared_up_to_the_first_difference() -> None:
    translator = Translator(STUDENT, TEACHER, max_tokens=100)
    ours, theirs = [9, 9, *STUDENT("xaz").input_ids, EOS], [9, 9, *TEACHER("xbz").input_ids, END]
    mask = [False, False, True, True, True, True]
    assert translator.spans(ours, mask, theirs, mask) == [span((0, 1), (0, 1))]


def test_an_end_is_compared_alone_and_only_of_a_whole_text() -> None:
    assert spans_of([EOS]) == ([span((0, 1), (0, 1))], [END])
    found, _ = spans_of([*STUDENT("ab").input_ids])  # cut at the longest response
    assert found == [span((0, 2), (0, 1))]


@pytest.mark.parametrize(("room", "count"), [(1, 1), (2, 2), (0, 0), (-3, 0)])
def test_a_teachers_sequence_is_cut_at_its_limit(room: int, count: int) -> None:
    found, _ = spans_of([*STUDENT("xyz").input_ids, EOS], max_tokens=len(PROMPT) + room)
    assert len(found) == count


def test_each_turn_of_a_conversation_is_compared() -> None:
    translator = Translator(STUDENT, TEACHER, max_tokens=100)
    turn, other = [*STUDENT("ab").input_ids, EOS], [*TEACHER("ab").input_ids, END]
    ours = ([9, *turn, 9, *turn], [False, True, True, True, False, True, True, True])
    theirs = ([5, 5, *other, *other[:0], 5, *other], [False, False, True, True, False, True, True])
    found = translator.spans(*ours, *theirs)
    assert found == [span((0, 2), (0, 1)), span((2, 3), (1, 2)), span((3, 5), (2, 3)), span((5, 6), (3, 4))]
    assert num_ranges(ours[1]) == num_ranges(theirs[1]) == 2


def test_a_text_without_a_prompt_counts_from_its_first_byte() -> None:
    translator = Translator(STUDENT, TEACHER, max_tokens=100)
    ours, theirs = STUDENT("abcdx").input_ids, TEACHER("abcdx").input_ids  # a, b, c, d, x and abc, d, x
    found = translator.spans(ours, [False, *[True] * 4], theirs, [False, True, True])
    assert found == [span((2, 3), (0, 1)), span((3, 4), (1, 2))]  # the mask begins after `a`, and after `abc`


def test_pairs_have_the_same_bytes_and_no_id_twice() -> None:
    pairs = Translator(STUDENT, TEACHER, max_tokens=100).pairs
    ours, theirs = token_bytes(STUDENT), token_bytes(TEACHER)
    assert (EOS, END) in pairs
    assert all(ours[i] == theirs[j] for i, j in pairs)
    assert len(pairs) == len({i for i, _ in pairs}) == len({j for _, j in pairs}) == 257  # all bytes, and the end


def test_only_the_same_ids_are_alike() -> None:
    assert maps_alike(STUDENT, byte_tokenizer())
    assert not maps_alike(STUDENT, TEACHER)
    larger = byte_tokenizer()
    larger.add_tokens(["further"])
    assert not maps_alike(STUDENT, larger)
    assert not maps_alike(larger, STUDENT)

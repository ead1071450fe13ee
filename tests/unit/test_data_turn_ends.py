"""A turn that ended by itself has a single end, for any text of the template before the end."""

from __future__ import annotations

import pytest

from rlhf.data.chat import turn_end
from rlhf.data.turn_ends import TurnEnds
from rlhf.models.files.tiny import byte_tokenizer
from tests.sentencepiece_tokenizers import SPACE, TOKENIZERS

ASK, ANSWER = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
MORE = {"role": "user", "content": "more"}


@pytest.mark.parametrize("added", ["", " no"])
@pytest.mark.parametrize("kind", ["legacy", "first", "prepend", "swallowing"])
def test_a_continued_turn_is_what_the_template_writes(kind: str, added: str) -> None:
    """The turn ended by itself, at a limit, or at a stop string with text of the client behind."""
    tokenizer = TOKENIZERS[kind]()

    def ids(messages: list[dict[str, str]], *, generates: bool = False) -> list[int]:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generates)
        return tokenizer(text, add_special_tokens=False).input_ids  # type: ignore[no-any-return]

    end = turn_end(tokenizer)
    ends = TurnEnds(tokenizer, (end,))
    turn = ids([ASK, ANSWER])
    ended = turn[: len(turn) - turn[::-1].index(end)]
    whole = ids([ASK, {**ANSWER, "content": f"answer{added}"}, MORE], generates=True)
    text = tokenizer.apply_chat_template([ASK, ANSWER, MORE], tokenize=False, add_generation_prompt=True)
    tail = text.partition("answer")[2]
    cut = ended[:-1]
    if tokenizer.convert_ids_to_tokens(cut[-1]) == SPACE:
        cut = cut[:-1]  # it belongs to the template's text before the end
    assert cut + ends.tokens_behind(cut, tail, added=added) == whole
    assert added or ended + ends.tokens_behind(ended, tail) == whole


EOS, EOM, TEXT = 257, 262, ord("x")  # the template's end, another end of the model, and a token that ends nothing


@pytest.mark.parametrize(
    ("last", "text", "behind"),
    [
        (EOS, "<|eos|><|user|>hi", "<|user|>hi"),
        (EOS, " \n<|eos|>\n<|user|>hi", "\n<|user|>hi"),
        (EOM, "<|eos|><|user|>hi", "<|user|>hi"),
        (TEXT, " <|eos|><|user|>hi", " <|eos|><|user|>hi"),  # cut by a limit
        (EOS, "<|user|>hi", "<|user|>hi"),  # the next turn begins without an end of the last one
        (258, "<|system|>hi", "hi"),  # the model's end begins the next turn, as with GLM
        (259, "<|system|>hi", "<|system|>hi"),
        (259, "<|eos|><|user|>hi", "<|eos|><|user|>hi"),  # a client's stop string, which ends no turn
    ],
)
def test_a_turn_has_one_end(last: int, text: str, behind: str) -> None:
    tokenizer = byte_tokenizer()
    ends = TurnEnds(tokenizer, (EOS,), (EOM, 258))
    assert tokenizer.decode(ends.tokens_behind([TEXT, last], text)) == behind

"""Write the chat template's text behind a sampled turn, in tokens. A turn that the model ended already has an end.

Environments and agents' sessions continue after a turn with this text. The tokens of a turn are never rendered again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from rlhf.data.tokenization import Continuation, special_tokens


class TurnEnds:
    """Knows the tokens for the end of a turn: `of_template`, if any, and the model's further ends, `of_model`.

    A template may write space before the end. A model may have several ends, such as Llama 3.1's `<|eom_id|>` beside
    `<|eot_id|>`. Invariant: no second end follows a turn that the model ended.
    """

    def __init__(self, tokenizer: Any, of_template: Collection[int], of_model: Collection[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._of_template = {*of_template}
        self._of_model = {*of_model, *of_template, tokenizer.eos_token_id}
        self._special = special_tokens(tokenizer)
        self._continuation = Continuation(tokenizer)

    def tokens_behind(self, sampled: Sequence[int], text: str, *, added: str = "") -> list[int]:
        """Return the tokens of the template's text behind the tokens of a turn, without an end already in the turn.

        `added` is a further part of the turn. UserError if the tokenizer joins the text with any text before it.
        """
        last, stripped = sampled[-1], text.lstrip()
        if not added and (first := self._special.match(stripped)):
            token = self.tokenizer.convert_tokens_to_ids(first.group())
            if token == last or (token in self._of_template and last in self._of_model):
                text = stripped[first.end() :]
        before = self.tokenizer.decode([last], skip_special_tokens=False)
        (token_ids,) = self._continuation.encode([(before, added + text)])
        return token_ids

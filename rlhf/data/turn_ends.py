"""Write the chat template's text behind a sampled turn, in tokens. The turn has its end already if it ended by itself.

Environments and agents' sessions continue their turns with it. The tokens of a turn are never rendered again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from rlhf.data.tokenization import Continuation, special_tokens


class TurnEnds:
    """Knows the token that the template writes at the end of a turn, and the tokens with which the model ends one.

    A template may write space before the end. A model may have several ends, such as Llama 3.1's `<|eom_id|>` beside
    `<|eot_id|>`. Invariant: a turn that ended by itself is followed by no second end.

    Args:
        of_template: the special token that the template writes at the end of a turn, if there is one.
        of_model: the model's end tokens, besides that of the template and the tokenizer's.
    """

    def __init__(self, tokenizer: Any, of_template: Collection[int], of_model: Collection[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._of_template = {*of_template}
        self._of_model = {*of_model, *of_template, tokenizer.eos_token_id}
        self._special = special_tokens(tokenizer)
        self._continuation = Continuation(tokenizer)

    def tokens_behind(self, sampled: Sequence[int], text: str, *, added: str = "") -> list[int]:
        """Return the tokens of the template's text behind a turn, without the end that the turn has already.

        UserError if the tokenizer joins the text with any text before it.

        Args:
            sampled: the tokens of the turn.
            added: text that goes on with the turn before the template's text.
        """
        last, stripped = sampled[-1], text.lstrip()
        first = self._special.match(stripped)
        if first is not None and not added:
            token = self.tokenizer.convert_tokens_to_ids(first.group())
            if token == last or (token in self._of_template and last in self._of_model):
                text = stripped[first.end() :]
        before = self.tokenizer.decode([last], skip_special_tokens=False)
        (token_ids,) = self._continuation.encode([(before, added + text)])
        return token_ids

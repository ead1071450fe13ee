"""Continue a conversation: turn the environment's text into the tokens between two turns of the policy.

The tokens of a turn are never rendered again. The tokens after a turn come from the chat template. The template renders
a conversation with a sentinel instead of the policy's turn, and the text after the turn's end is used. Unsuitable
templates are refused before a run starts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from rlhf.data.chat import ASSISTANT, Message, render, require_template, text_after_turn, turn_end
from rlhf.data.images import RowImages
from rlhf.data.tokenization import Continuation, encode, encode_raw
from rlhf.data.turn_ends import TurnEnds
from rlhf.errors import UserError
from rlhf.rollouts.environments.observations import Observation, Seen, expanded_observations, message_of
from rlhf.types import Prompt

PLACEHOLDER = "{observation}"  # position of the first observation in a prompt
_OBSERVATION = "qzobservationzq"
_KEY = "rollouts.environment"


class TurnWriter(Protocol):
    """Writes the tokens between the policy's turns.

    `stop_token` ends a turn. None leaves the end to the model's end-of-sequence tokens.
    """

    stop_token: int | None

    def after(self, sampled: Sequence[int], observation: Observation | tuple[Observation, ...]) -> tuple[int, ...]:
        """Return the tokens after a sampled turn. Several observations are the results of tool calls.

        UserError: images cannot be shown to this model.
        """


def first_prompt(
    prompt: Prompt, observation: Observation, tokenizer: Any, images: RowImages | None = None
) -> tuple[int, ...]:
    """Return the prompt's tokens with the first observation inserted.

    ValueError for an observation without a placeholder, or a placeholder without an observation. UserError: the prompt
    has images already, or the model takes no images.
    """
    if PLACEHOLDER not in prompt.text:
        if observation:
            missing = f"the prompt has no {PLACEHOLDER} to mark its place"
            raise ValueError(f"reset returned {observation!r:.60}, but {missing}")
        return prompt.token_ids
    if not observation:
        raise ValueError(f"reset returned no observation, but the prompt has {PLACEHOLDER}")
    if min(prompt.token_ids) < 0:
        raise UserError(f"the prompt has images and {PLACEHOLDER}. Let reset return the images, or leave them out.")
    tokenise = encode if prompt.is_chat else encode_raw
    text = observation if isinstance(observation, str) else _written(observation, tokenizer)
    (token_ids,) = tokenise([prompt.text.replace(PLACEHOLDER, text)], tokenizer)
    return tuple(expanded_observations(token_ids, [observation], images))


def _written(observation: Seen, tokenizer: Any) -> str:
    """Return an observation with images as the chat template writes the observation in a user's turn."""
    require_template(tokenizer, _KEY)
    part = render([message_of("user", Seen((_OBSERVATION,)))], tokenizer, add_generation_prompt=False, place=_KEY)
    whole = render([message_of("user", observation)], tokenizer, add_generation_prompt=False, place=_KEY)
    before, _, after = part.partition(_OBSERVATION)
    return whole.removeprefix(before).removesuffix(after)


class RawTurns:
    """Turns of prompts without a chat template: the observation's tokens follow directly after the sampled tokens."""

    stop_token: int | None = None

    def __init__(self, tokenizer: Any, images: RowImages | None = None) -> None:
        self.tokenizer = tokenizer
        self.images = images
        self._continuation = Continuation(tokenizer)

    def after(self, sampled: Sequence[int], observation: Observation | tuple[Observation, ...]) -> tuple[int, ...]:
        results = observation if isinstance(observation, tuple) else (observation,)
        texts = [result for result in results if isinstance(result, str)]
        if len(texts) < len(results):
            raise UserError("an observation has an image, and only a chat template says where images stand.")
        text = "\n".join(texts)
        before = self.tokenizer.decode(list(sampled[-1:]), skip_special_tokens=False)
        (token_ids,) = self._continuation.encode([(before, text)])
        return tuple(expanded_observations(token_ids, (), self.images))


class ChatTurns:
    """Turns of chat models. UserError if the template does not let a turn be continued."""

    stop_token: int | None

    def __init__(
        self, tokenizer: Any, *, with_tools: bool, ends: Collection[int] = (), images: RowImages | None = None
    ) -> None:
        """Check the template.

        Args:
            ends: the model's end tokens, besides the end tokens of template and tokenizer.
            images: puts the images of observations into token ids. None: the model reads only text.
        """
        require_template(tokenizer, _KEY)
        self.tokenizer = tokenizer
        self.images = images
        self.stop_token = turn_end(tokenizer)
        if self.stop_token is None:
            tail = self._text_after_turn([], add_generation_prompt=False)
            raise self._refusal(f"an assistant's turn ends with {tail!r:.40}, not with a special token")
        self._ends = TurnEnds(tokenizer, (self.stop_token,), ends)
        self._check([{"role": "user", "content": _OBSERVATION}])
        if with_tools:
            self._check([{"role": "tool", "content": _OBSERVATION}])

    def after(self, sampled: Sequence[int], observation: Observation | tuple[Observation, ...]) -> tuple[int, ...]:
        role = "tool" if isinstance(observation, tuple) else "user"
        results = observation if isinstance(observation, tuple) else (observation,)
        token_ids = self._tokens(sampled, [message_of(role, result) for result in results])
        return tuple(expanded_observations(token_ids, results, self.images))

    def _tokens(self, sampled: Sequence[int], messages: Sequence[Message]) -> tuple[int, ...]:
        """Return the template's tokens from the end of a sampled turn to the beginning of the next."""
        text = self._text_after_turn(messages, add_generation_prompt=True)
        return tuple(self._ends.tokens_behind(sampled, text))

    def _text_after_turn(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        text = text_after_turn(messages, self.tokenizer, add_generation_prompt=add_generation_prompt, place=_KEY)
        if text is None:
            raise self._refusal("it does not write an assistant's turn exactly once and unchanged")
        return text

    def _check(self, messages: Sequence[Message]) -> None:
        """Check that the template writes the observation once, with the same tokens as in a whole conversation."""
        role = messages[0]["role"]
        assert self.stop_token is not None
        end = str(self.tokenizer.convert_ids_to_tokens(self.stop_token))
        after = self._text_after_turn(messages, add_generation_prompt=True)
        if after.count(_OBSERVATION) != 1 or not after.lstrip().startswith(end):
            raise self._refusal(f"after an assistant's turn, a turn of role {role} is written as {after!r:.60}")
        conversation = [{"role": "user", "content": "Hello."}, {"role": ASSISTANT, "content": "Fine."}, *messages]
        whole = render(conversation, self.tokenizer, add_generation_prompt=True, place=_KEY)
        apart = (self.stop_token, *self._tokens([self.stop_token], messages))
        if tuple(encode([whole], self.tokenizer)[0][-len(apart) :]) != apart:
            raise self._refusal(f"a turn of role {role} has different tokens outside than within a conversation")

    def _refusal(self, why: str) -> UserError:
        return UserError(
            f"{_KEY}: the chat template of {self.tokenizer.name_or_path} cannot be continued turn by turn: {why}. Use "
            "another model, or string prompts with data.apply_chat_template: false."
        )


def turn_text(sampled: Sequence[int], tokenizer: Any, *, stop_token: int | None, skip_special_tokens: bool) -> str:
    """Return a sampled turn as text, without the end token."""
    ends = sampled and sampled[-1] in (stop_token, tokenizer.eos_token_id)
    text: str = tokenizer.decode(list(sampled[:-1] if ends else sampled), skip_special_tokens=skip_special_tokens)
    return text

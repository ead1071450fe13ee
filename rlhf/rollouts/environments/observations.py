"""Observations of environments: texts, or texts with images.

An environment returns an image within a list of parts, in the form of messages in data sets. The images are stored by
content, and stand in the conversation's token ids as the images of a prompt do.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.data.chat import Message
from rlhf.data.images import RowImages
from rlhf.errors import UserError


@dataclass(frozen=True, slots=True)
class Seen:
    """An observation with images."""

    parts: tuple[str | bytes, ...]  # bytes: an encoded image


Observation = str | Seen


def read_observation(reply: str | list[Any]) -> Observation | tuple[Observation, ...]:
    """Return the observation in the reply of an environment's process. A tuple holds the results of tool calls."""
    if isinstance(reply, str):
        return reply
    if reply and all(isinstance(part, dict) for part in reply):
        return Seen(tuple(part.get("text") or base64.b64decode(part.get("image", "")) for part in reply))
    return tuple(Seen(()) if isinstance(seen := read_observation(one), tuple) else seen for one in reply)


def num_images(observation: Observation | tuple[Observation, ...]) -> int:
    """Return the number of images in an observation, or in the results of tool calls."""
    results = observation if isinstance(observation, tuple) else (observation,)
    return sum(isinstance(part, bytes) for seen in results if isinstance(seen, Seen) for part in seen.parts)


def message_of(role: str, observation: Observation) -> Message:
    """Return the observation as a message for a chat template."""
    if isinstance(observation, str):
        return {"role": role, "content": observation}
    parts = observation.parts
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
    return {"role": role, "content": content}


def expanded_observations(
    token_ids: Sequence[int], observations: Sequence[Observation], images: RowImages | None
) -> list[int]:
    """Return token ids with each placeholder replaced by an image of the observations, in order.

    UserError: an image is damaged or refused, a text has the mark of an image, or the model reads only text.
    """
    encoded = [
        part for seen in observations if isinstance(seen, Seen) for part in seen.parts if isinstance(part, bytes)
    ]
    if images is None:
        if encoded:
            raise UserError("An observation has an image, and the model reads only text. Use a vision model.")
        return list(token_ids)
    keys = [images.reader.add(part, place="an observation", folder=None) for part in encoded]
    return images.processing.expand(token_ids, keys, images.reader.store)

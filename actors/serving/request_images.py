"""Take the images out of requests over HTTP, before vLLM reads the messages.

vLLM would fetch addresses, open files and decode any format. Here an image is a data URI, decoded under the limits of
all images, and stored by content. Video, sound and embeddings are refused.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from vllm.renderers.chat_utils import has_non_text_content

from actors.rollout.image_inputs import ImageInputs
from actors.serving.refusals import RefusedCall
from rlhf.errors import UserError
from rlhf.vision.keys import image_name

_KINDS = ("image_url", "input_image")  # types of parts with an image in the chat and responses interfaces
Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RequestImages:
    """The images of a front's requests."""

    inputs: ImageInputs

    def take(self, messages: Sequence[Message]) -> list[Message]:
        """Store the images of messages, and return the messages with `{"type": "image", "image": NAME}` in their place.

        RefusedCall: no data URI, no image, or too many images.
        """
        taken = [
            {**message, "content": [self._part(part, f"messages[{i}].content[{j}]") for j, part in enumerate(content)]}
            if isinstance(content := message.get("content"), list)
            else message
            for i, message in enumerate(messages)
        ]
        count, most = len(self.keys(taken)), self.inputs.reader.limits.max_images
        if count > most:
            is_of_run = self.inputs.place.kept_s is None
            limit = f"data.max_images of the run is {most}" if is_of_run else f"the server takes {most}"
            raise RefusedCall(f"`messages` hold {count} images, and {limit}", param="messages")
        self._remove_old()
        return taken

    def keys(self, taken: Sequence[Message]) -> list[int]:
        """Return the keys of the images in order."""
        return [int(part["image"], 16) for message in taken for part in _parts(message) if _is_image(part)]

    def shown(self, taken: Sequence[Message]) -> list[Message]:
        """Return messages for vLLM, with decoded images."""
        return [
            {**message, "content": [self._shown(part) for part in message["content"]]}
            if isinstance(message.get("content"), list)
            else message
            for message in taken
        ]

    def refuse_marks(self, taken: Sequence[Message]) -> None:
        """Raise RefusedCall if a text has a token that stands for an image: the image would be put there."""
        for message in taken:
            content = message.get("content")
            texts = [content] if isinstance(content, str) else [str(part.get("text", "")) for part in _parts(message)]
            for mark in self.inputs.processing.typed_tokens:
                if any(mark in text for text in texts):
                    raise RefusedCall(f"the text {mark} stands for an image. Send images as parts", param="messages")

    def expand(self, token_ids: Sequence[int], taken: Sequence[Message]) -> list[int]:
        """Return token ids with each placeholder replaced by the image of the messages."""
        return self.inputs.processing.expand(token_ids, self.keys(taken), self.inputs.store)

    def embedded(self, rendered: Mapping[str, Any], taken: Sequence[Message]) -> list[int]:
        """Return the token ids of a prompt that vLLM has rendered, with `-key` at the embedded positions."""
        ids = list(rendered["prompt_token_ids"])
        places = rendered["mm_placeholders"]["image"] if "mm_placeholders" in rendered else ()
        keys = self.keys(taken)
        if len(keys) != len(places):
            message = f"the chat template shows {len(places)} of the {len(keys)} images of `messages`"
            raise RefusedCall(message, param="messages")
        for key, place in zip(keys, places, strict=True):
            embedded = [True] * place.length if place.is_embed is None else place.is_embed.tolist()
            for i, is_embedded in enumerate(embedded, start=place.offset):
                if is_embedded:
                    ids[i] = -key
        return ids

    def _part(self, part: Any, place: str) -> Any:
        if not isinstance(part, Mapping) or not has_non_text_content([{"content": [part]}]):
            return part
        if part.get("type") not in _KINDS:
            kind = part.get("type")
            raise RefusedCall(f"`{place}` has the type {kind!r:.60}; there are text and image_url", param="messages")
        try:
            key = self.inputs.reader.add_part(part, place=f"`{place}`", folder=None)
        except UserError as error:
            raise RefusedCall(str(error), param="messages") from error
        self.inputs.store.path(key).touch()
        return {"type": "image", "image": image_name(key)}

    def _remove_old(self) -> None:
        """Remove images that no request has named for the time of `kept_s`, so that a server's disk does not fill."""
        if (kept_s := self.inputs.place.kept_s) is None:
            return
        for path in self.inputs.store.folder.iterdir():
            with suppress(FileNotFoundError):  # another request has removed the file
                if path.is_file() and time.time() - path.stat().st_mtime > kept_s:
                    path.unlink()

    def _shown(self, part: Any) -> Any:
        if not _is_image(part):
            return part
        return {"type": "image_pil", "image_pil": self.inputs.store.image(int(part["image"], 16))}


def _parts(message: Message) -> list[Mapping[str, Any]]:
    content = message.get("content")
    return [part for part in content if isinstance(part, Mapping)] if isinstance(content, list) else []


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image"

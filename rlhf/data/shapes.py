"""Draw questions about coloured shapes: only the image has the answer.

This module is a part of `rlhf.data.tasks`, where the splits are defined.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf.errors import UserError

SHAPES = "shapes"
_COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "yellow": (235, 200, 40)}
_FORMS = ("square", "circle", "triangle")
_PLACES = {"left": (0.25, 0.5), "right": (0.75, 0.5), "top": (0.5, 0.25), "bottom": (0.5, 0.75)}  # of the middle
_QUESTIONS = {
    "colour": ("What colour is the shape?", tuple(_COLOURS)),
    "count": ("How many shapes are there?", ("1", "2", "3", "4")),
    "place": ("Where is the shape?", tuple(_PLACES)),
}
_GREY = (200, 200, 200)
_LEAST_PIXELS, _MOST_PIXELS = 16, 1024


@dataclass(frozen=True, slots=True)
class _Shape:
    form: str
    colour: str
    x: int  # of the left edge, in pixels
    y: int
    side: int


@dataclass(frozen=True, slots=True)
class Scene:
    """A question about an image. Equal scenes have equal images."""

    ask: str
    pixels: int  # of each side of the image
    shapes: tuple[_Shape, ...]
    answer: str

    @property
    def question(self) -> str:
        return _QUESTIONS[self.ask][0]

    @property
    def answers(self) -> tuple[str, ...]:
        """Return all answers that scenes with this question have, each equally often."""
        return _QUESTIONS[self.ask][1]

    def image(self) -> bytes:
        """Return the image as an encoded PNG."""
        from PIL import Image, ImageDraw

        image = Image.new("RGB", (self.pixels, self.pixels), _GREY)
        canvas = ImageDraw.Draw(image)
        for shape in self.shapes:
            left, top, right, bottom = shape.x, shape.y, shape.x + shape.side - 1, shape.y + shape.side - 1
            if shape.form == "square":
                canvas.rectangle((left, top, right, bottom), fill=_COLOURS[shape.colour])
            elif shape.form == "circle":
                canvas.ellipse((left, top, right, bottom), fill=_COLOURS[shape.colour])
            else:
                corners = [(left, bottom), ((left + right) // 2, top), (right, bottom)]
                canvas.polygon(corners, fill=_COLOURS[shape.colour])
        encoded = io.BytesIO()
        image.save(encoded, "PNG")
        return encoded.getvalue()


def scenes(seed: int, args: Mapping[str, Any]) -> Iterator[Scene]:
    """Yield scenes without end, the same for the same seed and args. Scenes may repeat.

    Args of the task: `ask`, one of colour, count and place, or a list of them (all); `pixels` of each side (32).
    UserError: an unknown arg or value.
    """
    asks, pixels = _read(args)
    draw = random.Random(f"{SHAPES} {seed}")
    while True:
        ask = draw.choice(asks)
        answer = draw.choice(_QUESTIONS[ask][1])
        yield Scene(ask, pixels, _drawn(ask, answer, pixels, draw), answer)


def _read(args: Mapping[str, Any]) -> tuple[list[str], int]:
    given, pixels = args.get("ask", list(_QUESTIONS)), args.get("pixels", 32)
    asks = [given] if isinstance(given, str) else given
    if args.keys() - {"ask", "pixels"}:
        raise UserError(f"Task {SHAPES} takes the args ask and pixels; found {', '.join(args)}.")
    if not isinstance(asks, list | tuple) or not asks or not all(ask in _QUESTIONS for ask in asks):
        raise UserError(f"Task {SHAPES}: args.ask is {given!r}, expected one or a list of {', '.join(_QUESTIONS)}.")
    if not isinstance(pixels, int) or isinstance(pixels, bool) or not _LEAST_PIXELS <= pixels <= _MOST_PIXELS:
        raise UserError(
            f"Task {SHAPES}: args.pixels is {pixels!r}, expected a whole number from {_LEAST_PIXELS} to {_MOST_PIXELS}."
        )
    return list(asks), pixels


def _drawn(ask: str, answer: str, pixels: int, draw: random.Random) -> tuple[_Shape, ...]:
    """Return shapes that have the answer. A shape lies whole in the image, and touches no other shape."""
    if ask == "count":
        cells = sorted(draw.sample(range(4), int(answer)))
        half = pixels // 2
        return tuple(_placed((cell % 2 * half, cell // 2 * half), half, draw) for cell in cells)
    if ask == "colour":
        return (_placed((0, 0), pixels, draw, colour=answer),)
    across, down = _PLACES[answer]
    half = pixels // 2
    return (_placed((round(across * pixels) - half // 2, round(down * pixels) - half // 2), half, draw),)


def _placed(corner: tuple[int, int], room: int, draw: random.Random, *, colour: str | None = None) -> _Shape:
    """Return a shape at a random place of a square of `room` pixels, with at least a pixel of margin."""
    side = draw.randint(room * 2 // 5, room * 3 // 5)
    x, y = (edge + draw.randint(1, room - side - 1) for edge in corner)
    return _Shape(draw.choice(_FORMS), colour or draw.choice(list(_COLOURS)), x, y, side)

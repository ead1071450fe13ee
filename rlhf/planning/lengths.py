"""Model response lengths by recorded values or by a log-normal distribution, truncated at the run's limit."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from rlhf.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Describe response lengths in tokens: `seen` values drawn with replacement, or a log-normal distribution."""

    most: int  # responses are truncated at this length
    mean: float = 0.0
    sigma: float = 0.0  # of the logarithm; 0: all lengths are equal
    seen: tuple[int, ...] = ()
    image_tokens: float | None = None  # of the images of a prompt, on average; None: unknown

    def draw(self, random: Random) -> int:
        if self.seen:
            return min(self.seen[random.randrange(len(self.seen))], self.most)
        if self.sigma == 0.0:
            return min(max(round(self.mean), 1), self.most)
        location = math.log(self.mean) - self.sigma**2 / 2
        return min(max(round(random.lognormvariate(location, self.sigma)), 1), self.most)

    def average(self) -> float:
        random = Random(0)
        return sum(self.draw(random) for _ in range(4000)) / 4000

    def __str__(self) -> str:
        if self.seen:
            return f"{len(self.seen):,} lengths of a file, cut at {self.most:,}"
        spread = f"log-normal, sigma {self.sigma:g}, " if self.sigma else "all alike, "
        return f"{spread}mean {self.mean:,.0f} before the cut at {self.most:,}"


def parse_lengths(text: str, *, most: int) -> Lengths:
    """Parse `lognormal:MEAN:SIGMA` or read a file of lengths. Raise UserError if the text is neither."""
    if text.startswith("lognormal:"):
        parts = text.split(":")[1:]
        try:
            mean, sigma = (float(part) for part in parts)
        except ValueError as error:
            raise UserError(f"--lengths {text}: expected lognormal:MEAN:SIGMA, such as lognormal:2000:0.8") from error
        if not (1.0 <= mean < 1e9 and 0.0 <= sigma <= 5.0):
            raise UserError(f"--lengths {text}: expected a mean from 1 and a sigma from 0 to 5")
        return Lengths(most=most, mean=mean, sigma=sigma)
    return Lengths(most=most, seen=tuple(_read(Path(text))))


def _read(path: Path) -> Sequence[int]:
    """Read a number per line, or `response_tokens` from all samples of a run folder.

    Samples of evaluations are skipped: such samples are far more numerous and may use different sampling settings.
    """
    files = sorted(path.glob("samples/*.jsonl")) if path.is_dir() else [path]
    lengths: list[int] = []
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8").split("\n")  # a response may contain other line separators
        except (OSError, UnicodeDecodeError) as error:
            why = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else f"is not text: {error}"
            raise UserError(f"--lengths {path}: {why}. Give a file or lognormal:MEAN:SIGMA") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
                if isinstance(value, dict):
                    if value.get("split", "train") != "train":
                        continue
                    value = value["response_tokens"]
                length = int(value)
            except (ValueError, TypeError, KeyError, OverflowError) as error:
                wanted = "expected a number, or an object with `response_tokens`"
                raise UserError(f"{file}:{number}: {wanted}, got {line[:60]!r}") from error
            if length < 1:
                raise UserError(f"{file}:{number}: the length is {length}, expected at least 1")
            lengths.append(length)
    if not lengths:
        raise UserError(f"--lengths {path}: it has no lengths")
    return lengths

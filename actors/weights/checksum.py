"""The checksum of published weights, taken in place: xxh3-64 on a CPU, a weighted sum of 64-bit words on a GPU.

Both ends of a transport hold the weights in the same kind of memory, so both ends compute the same kind of sum.
"""

from __future__ import annotations

import torch
import xxhash
from jaxtyping import Int64, UInt8
from torch import Tensor

CHUNK_WORDS = 4 << 20  # summed at once: the words and their weights take 32 MiB each
WEIGHT_STEP = -7046029254386353131  # 2^64 / golden ratio: it spreads the weights over all 64 bits


class Checksum:
    """Sums up bytes in parts of whole 64-bit words, all on a CPU or on one GPU."""

    def __init__(self) -> None:
        self._xxh3 = xxhash.xxh3_64()
        self._sum: Int64[Tensor, ""] | None = None  # on the GPU: reading it waits for all additions
        self._words = 0

    def add(self, part: UInt8[Tensor, " bytes"]) -> None:
        """Add the next part of the run to the sum."""
        if not part.is_cuda:
            self._xxh3.update(part.numpy().data)
            return
        added = weighted_sum(part.view(torch.int64), first=self._words)
        self._sum = added if self._sum is None else self._sum + added
        self._words += part.numel() // 8

    def hexdigest(self) -> str:
        """Return the checksum of all bytes so far, 16 hexadecimal digits."""
        if self._sum is None:
            return self._xxh3.hexdigest()
        return f"{int(self._sum.item()) & (2**64 - 1):016x}"


def weighted_sum(words: Int64[Tensor, " words"], *, first: int) -> Int64[Tensor, ""]:
    """Return the sum of word * weight modulo 2^64. Each place in the whole run has a different odd weight.

    An odd weight has an inverse, so a change of one word changes the sum, and so do swapped words.
    """
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for begin in range(0, len(words), CHUNK_WORDS):
        chunk = words[begin : begin + CHUNK_WORDS]
        at = torch.arange(first + begin, first + begin + len(chunk), device=words.device)
        total += (chunk * (at.mul_(WEIGHT_STEP).bitwise_or_(1))).sum()
    return total

"""Find the common first tokens of sequences, in a tree of the tokens.

A sequence shares first tokens with earlier sequences, up to a given length. This module computes nothing with a model:
`rlhf.workers.microbatches` decides which sequences stand in one row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """The first `length` tokens of a sequence, which are also the first tokens of sequence `of`.

    No sequence before `of` shares as many tokens.
    """

    of: int
    length: int


class PrefixTree:
    """Sequences, added in order, as a tree of common first tokens."""

    def __init__(self) -> None:
        self._sequences: list[TokenIds] = []
        self._edges: dict[int, _Edge] = {}  # by their first token

    def shared(self, tokens: TokenIds, *, most: int) -> SharedPrefix | None:
        """Return the longest prefix shared with the sequences of the tree, of at most `most` tokens. None: no token."""
        shared: SharedPrefix | None = None
        place, edges = 0, self._edges
        while place < most and (edge := edges.get(int(tokens[place]))) is not None:
            place += self._num_common(edge, tokens[:most])
            shared = SharedPrefix(of=edge.of, length=place)
            if place < edge.end:
                break
            edges = edge.after
        return shared

    def add(self, tokens: TokenIds) -> None:
        """Add a sequence. The sequence's index is the number of sequences before."""
        self._sequences.append(tokens)
        place, edges = 0, self._edges
        while place < len(tokens):
            edge = edges.get(int(tokens[place]))
            if edge is None:
                edges[int(tokens[place])] = _Edge(of=len(self._sequences) - 1, start=place, end=len(tokens))
                return
            place += self._num_common(edge, tokens)
            if place < edge.end:
                rest = _Edge(of=edge.of, start=place, end=edge.end, after=edge.after)
                edge.end, edge.after = place, {int(self._sequences[edge.of][place]): rest}
            edges = edge.after

    def _num_common(self, edge: _Edge, tokens: TokenIds) -> int:
        """Count the tokens of an edge repeated in `tokens` at the same positions."""
        return common_length(tokens[edge.start :], self._sequences[edge.of][edge.start : edge.end])


@dataclass(slots=True, kw_only=True)
class _Edge:
    """Tokens of a tree, as first added by the sequence `of`."""

    of: int  # the sequence that added the tokens
    start: int  # their position in this sequence
    end: int
    after: dict[int, _Edge] = field(default_factory=dict)  # the edges below this edge, by the first token


def shared_with_earlier(sequences: Iterable[tuple[TokenIds, int]]) -> list[SharedPrefix | None]:
    """Return the prefix shared by each sequence with earlier sequences, up to the number of tokens given."""
    tree, result = PrefixTree(), []
    for tokens, most in sequences:
        result.append(tree.shared(tokens, most=most))
        tree.add(tokens)
    return result


def common_length(first: TokenIds, second: TokenIds) -> int:
    """Return the number of equal tokens before the first difference."""
    size = min(len(first), len(second))
    differs = first[:size] != second[:size]
    return int(differs.argmax()) if differs.any() else size

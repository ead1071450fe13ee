"""Assign sequences to micro-batches and ranks: pure arithmetic on lengths.

The controller assigns ranks and the workers assign micro-batches. The functions see no tokens, and their results depend
only on their arguments.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence


def pack(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Return indices in few bins of at most `max_tokens` tokens each: best fit, longest first.

    The number of bins is at most 11/9 of the least possible, up to a constant (Johnson, 1973). Indices ascend within a
    bin. ValueError for a sequence longer than a bin.
    """
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free tokens, bin), ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > max_tokens:
            raise ValueError(f"sequence {index} has {length} tokens, more than the {max_tokens} of a micro-batch")
        place = bisect.bisect_left(free, (length, -1))
        if place < len(free):
            left, chosen = free.pop(place)
        else:
            left, chosen = max_tokens, len(bins)
            bins.append([])
        bins[chosen].append(index)
        bisect.insort(free, (left - length, chosen))
    return [sorted(members) for members in bins]


def pack_evenly(lengths: Sequence[int], *, max_tokens: int) -> list[list[int]]:
    """Return as many bins as `pack`, about equally full if `balance` can fit the sequences, or else `pack`'s bins.

    Full bins and a small last bin would take more memory and use smaller matrix products.
    """
    bins = pack(lengths, max_tokens=max_tokens)
    if len(bins) < 2:
        return bins
    even = balance(lengths, len(bins))
    return even if all(sum(lengths[i] for i in members) <= max_tokens for members in even) else bins


def balance(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Return the indices for each rank with about equal costs: the next costliest goes to the least loaded rank.

    The greatest rank cost is at most 4/3 of the least possible (Graham, 1969). Every rank gets an index if there are as
    many indices as ranks. Indices ascend within a rank.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks is {num_ranks}, expected at least 1")
    if any(not cost >= 0.0 for cost in costs):
        raise ValueError("costs must be numbers from 0")
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    # (cost, number of indices, rank): on equal cost the emptier rank comes first
    loads = [(0.0, 0, rank) for rank in range(num_ranks)]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, count, rank = loads[0]
        ranks[rank].append(index)
        heapq.heapreplace(loads, (load + costs[index], count + 1, rank))
    return [sorted(members) for members in ranks]

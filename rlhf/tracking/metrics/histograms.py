"""histograms.jsonl: the distributions of a step, one object a step, next to metrics.jsonl.

    {"step": 3, "advantages/histogram": {"edges": [-0.5, -0.35, ..., 0.5], "counts": [12, ..., 7]}, ...}

`counts[i]` values lay from `edges[i]` up to `edges[i + 1]`, so there are n + 1 edges for n counts. The edges of a
metric are the same in all steps and runs (see below). A row leaves out empty bins at both ends. The first and the last
of all bins also count the values beyond the edges. A metric without values in a step has no key in the row, and a step
without any histogram has no row. The driver writes the file, and a resumed run truncates it like metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.tracking.metrics.reductions import Histogram
from rlhf.tracking.run_folder.atomic import append_line

FILE = "histograms.jsonl"

# Fine near 0, where most advantages are, whatever their scale: powers of the root of 2 from 1/64 to 64 on both sides.
_SIZES = tuple(2.0 ** (k / 2) for k in range(-12, 13))
ADVANTAGE_EDGES = (*(-size for size in reversed(_SIZES)), 0.0, *_SIZES)
# Ratios compare as logarithms: 16 bins for each factor of 2, from 1/8 to 8, with edges around 1 and not at it.
RATIO_EDGES = (0.0, *(2.0 ** ((2 * k + 1) / 32) for k in range(-48, 48)))
# Whole numbers of tokens, four bins for each factor of 2, to 2^20.
TOKEN_EDGES = (0.0, *sorted({float(round(2.0 ** (k / 4))) for k in range(81)}))
# One bin for each number of versions, to 64.
LAG_EDGES = tuple(float(lag) for lag in range(66))


def trimmed(histogram: Histogram) -> dict[str, Any]:
    """Return the form of a histogram for the file, without empty bins at the ends."""
    filled = [index for index, count in enumerate(histogram.counts) if count]
    first, last = filled[0], filled[-1]
    counts = [int(count) for count in histogram.counts[first : last + 1]]
    return {"edges": list(histogram.edges[first : last + 2]), "counts": counts}


def append_histograms(folder: Path, step: int, distributions: Mapping[str, Histogram]) -> None:
    """Write the step's row, unless empty. The write does not wait for the disk."""
    if distributions:
        row = {"step": step, **{key: trimmed(histogram) for key, histogram in sorted(distributions.items())}}
        append_line(folder / FILE, row, is_synced=False)

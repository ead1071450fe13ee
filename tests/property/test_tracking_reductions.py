"""Merge laws: for any split of the values over ranks and micro-batches, the result equals the result of all values."""

from __future__ import annotations

import math
import statistics
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.tracking.metrics.reductions import EffectiveShare, ExplainedVariance, Max, Mean, Min, Std

values = st.lists(st.floats(-1e3, 1e3), max_size=12)
splits = st.lists(values, min_size=1, max_size=5)


@given(splits)
def test_mean_of_any_split(parts: list[list[float]]) -> None:
    merged = reduce(Mean.merge, map(Mean.of, parts)).result()
    together = [x for part in parts for x in part]
    if together:
        assert merged == pytest.approx(statistics.fmean(together), abs=1e-9)
    else:
        assert math.isnan(merged)


@given(splits)
def test_std_of_any_split(parts: list[list[float]]) -> None:
    merged = reduce(Std.merge, map(Std.of, parts)).result()
    together = [x for part in parts for x in part]
    if together:
        assert merged == pytest.approx(statistics.pstdev(together), abs=1e-6)
    else:
        assert math.isnan(merged)


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12), min_size=1, max_size=5))
def test_max_of_any_split(parts: list[list[float]]) -> None:
    merged = reduce(Max.merge, (Max(value=max(part)) for part in parts))
    assert merged.result() == max(x for part in parts for x in part)
    least = reduce(Min.merge, (Min(value=min(part)) for part in parts))
    assert least.result() == min(x for part in parts for x in part)


@given(st.lists(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12), min_size=1, max_size=5))
def test_effective_share_of_any_split(parts: list[list[float]]) -> None:
    shares = [EffectiveShare(total=sum(p), squares=sum(x * x for x in p), count=len(p)) for p in parts]
    together = [x for part in parts for x in part]
    # 1 / (1 + the squared coefficient of variation)
    varied = statistics.pvariance(together) / statistics.fmean(together) ** 2
    assert reduce(EffectiveShare.merge, shares).result() == pytest.approx(1.0 / (1.0 + varied), rel=1e-6)


def test_effective_share_at_its_limits() -> None:
    assert EffectiveShare(total=3.0, squares=3.0, count=3).result() == 1.0
    assert EffectiveShare(total=2.0, squares=4.0, count=4).result() == 0.25  # one weight of 2, three of 0
    assert math.isnan(EffectiveShare(total=0.0, squares=0.0, count=4).result())


@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=2, max_size=20), st.data())
def test_explained_variance_of_any_split(pairs: list[tuple[int, int]], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(pairs)))
    parts = [
        ExplainedVariance(target=Std.of([t for t, _ in part]), residual=Std.of([t - p for t, p in part]))
        for part in (pairs[:cut], pairs[cut:])
    ]
    targets = [float(t) for t, _ in pairs]
    if len(set(targets)) == 1:
        return
    whole = 1 - statistics.pvariance([float(t - p) for t, p in pairs]) / statistics.pvariance(targets)
    assert parts[0].merge(parts[1]).result() == pytest.approx(whole, abs=1e-6)

"""The trials of a sweep depend on the parameters, the seed and their numbers alone."""

from __future__ import annotations

from random import Random

from rlhf.config.schema.sweep import Parameter
from rlhf.sweeps.space import corners, draw, drawn, grid

RATE = Parameter(min=1e-4, max=1e-2, scale="log")
SIZES = Parameter(values=(8, 16, None))
STEPS = Parameter(min=0.0, max=0.5, step=0.25)
COUNT = Parameter(min=1, max=4, integer=True)


def test_a_grid_has_every_combination_the_last_key_fastest() -> None:
    found = grid({"a": Parameter(values=(1, 2)), "b": STEPS})
    assert found == [{"a": a, "b": b} for a in (1, 2) for b in (0.0, 0.25, 0.5)]


def test_draws_depend_on_their_number_alone() -> None:
    parameters = {"rate": RATE, "size": SIZES}
    three = [draw(parameters, seed=1, number=n) for n in range(3)]
    assert [draw(parameters, seed=1, number=n) for n in range(5)][:3] == three
    assert draw(parameters, seed=2, number=0) != three[0]
    assert len({trial["rate"] for trial in three}) == 3


def test_a_log_scale_halves_at_the_geometric_mean() -> None:
    """sqrt(1e-4 * 1e-2) = 1e-3 is the median: 1000 of 2000 draws are below, give or take 22 (a standard deviation)."""
    found = [drawn(RATE, Random(n)) for n in range(2000)]
    assert all(1e-4 <= rate <= 1e-2 for rate in found)
    assert abs(sum(rate < 1e-3 for rate in found) - 1000) < 100
    assert all(float(f"{rate:.6g}") == rate for rate in found)


def test_steps_and_whole_numbers_reach_both_ends() -> None:
    assert {drawn(STEPS, Random(n)) for n in range(60)} == {0.0, 0.25, 0.5}
    found = {drawn(COUNT, Random(n)) for n in range(60)}
    assert found == {1, 2, 3, 4}
    assert all(isinstance(count, int) for count in found)


def test_corners_are_each_value_and_end_once() -> None:
    found = list(corners({"rate": RATE, "size": SIZES}))
    first = {"rate": 1e-4, "size": 8}
    assert found == [first, first | {"rate": 1e-2}, first | {"size": 16}, first | {"size": None}]

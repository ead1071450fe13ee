"""Laws of rlhf/data/mixing.py: every set has its share of any beginning, and a cursor finds the place again."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.mixing import Turns

WEIGHTS = st.lists(st.integers(1, 1000).map(lambda n: n / 100), min_size=1, max_size=6)


@given(WEIGHTS)
def test_no_set_is_a_whole_turn_off_its_share(weights: list[float]) -> None:
    turns = Turns(weights)
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    for turn in range(1, 120):
        turns.next()
        assert sum(turns.counts) == turn
        assert all(abs(n - turn * share) < 1 for n, share in zip(turns.counts, shares, strict=True))


@given(WEIGHTS, st.integers(0, 5000))
def test_a_place_is_found_as_if_all_turns_before_it_had_been_given(weights: list[float], turn: int) -> None:
    gave, went = Turns(weights), Turns(weights)
    for _ in range(turn % 400):
        gave.next()
    went.go_to(turn % 400)
    assert went.counts == gave.counts


@given(WEIGHTS, st.sampled_from([0.1, 0.5, 3.0]))
def test_only_the_ratios_of_weights_count(weights: list[float], factor: float) -> None:
    one, other = Turns(weights), Turns([float(Fraction(str(w)) * Fraction(str(factor))) for w in weights])
    assert [one.next() for _ in range(60)] == [other.next() for _ in range(60)]

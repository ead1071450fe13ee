"""Laws of packing (nothing lost or doubled, within the budget) and of mixing (every set has its share)."""

from __future__ import annotations

import itertools
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.mixing import Turns
from rlhf.data.packing import balance, pack, pack_evenly

COSTS = st.lists(st.floats(min_value=0.0, max_value=1e6), max_size=60)


@st.composite
def packings(draw: st.DrawFn) -> tuple[list[int], int]:
    max_tokens = draw(st.integers(1, 100))
    return draw(st.lists(st.integers(1, max_tokens), max_size=60)), max_tokens


@given(packings())
def test_bins_hold_everything_once_within_the_budget(case: tuple[list[int], int]) -> None:
    lengths, max_tokens = case
    few = len(pack(lengths, max_tokens=max_tokens))
    for function in (pack, pack_evenly):
        bins = function(lengths, max_tokens=max_tokens)
        assert len(bins) == few
        assert sorted(itertools.chain.from_iterable(bins)) == list(range(len(lengths)))
        assert all(0 < sum(lengths[i] for i in members) <= max_tokens for members in bins)
        assert bins == function(lengths, max_tokens=max_tokens)


@given(packings())
def test_no_two_bins_could_be_one(case: tuple[list[int], int]) -> None:
    lengths, max_tokens = case
    sums = sorted(sum(lengths[i] for i in members) for members in pack(lengths, max_tokens=max_tokens))
    assert len(sums) < 2 or sums[0] + sums[1] > max_tokens


def first_fit(lengths: list[int], max_tokens: int) -> int:
    """Return the number of bins of first fit, in the given order: each item into the first bin with room."""
    free: list[int] = []
    for length in lengths:
        place = next((i for i, left in enumerate(free) if left >= length), None)
        if place is None:
            free.append(max_tokens - length)
        else:
            free[place] -= length
    return len(free)


@given(st.lists(st.integers(1, 100), max_size=8))
def test_bins_match_the_best_of_all_orders_of_first_fit(lengths: list[int]) -> None:
    # Some order of first fit is optimal; with at most two sequences in a bin, so is best fit, longest first.
    lengths = [34 + length % 67 for length in lengths]  # 34 to 100: at most two in a bin of 100
    fewest = min(first_fit(list(order), 100) for order in itertools.permutations(lengths[:6]))
    assert len(pack(lengths[:6], max_tokens=100)) == fewest


@given(COSTS, st.integers(1, 9))
def test_ranks_hold_everything_once_and_none_is_empty_without_need(costs: list[float], num_ranks: int) -> None:
    ranks = balance(costs, num_ranks)
    assert len(ranks) == num_ranks
    assert sorted(itertools.chain.from_iterable(ranks)) == list(range(len(costs)))
    assert sum(bool(members) for members in ranks) == min(num_ranks, len(costs))
    assert ranks == balance(costs, num_ranks)


@given(COSTS.filter(bool), st.integers(1, 9))
def test_ranks_are_as_equal_as_the_algorithm_promises(costs: list[float], num_ranks: int) -> None:
    # Whoever is fullest took its last (cheapest) index when it had least: without it, it is below the mean.
    loads = [sum(costs[i] for i in members) for members in balance(costs, num_ranks)]
    fullest = balance(costs, num_ranks)[loads.index(max(loads))]
    assert max(loads) - min(costs[i] for i in fullest) <= sum(costs) / num_ranks * (1 + 1e-9) + 1e-9


@given(st.lists(st.integers(1, 1000), max_size=60), st.integers(1, 9))
def test_the_loads_do_not_depend_on_the_order_of_the_sequences(costs: list[int], num_ranks: int) -> None:
    def loads(order: list[int]) -> list[int]:
        return sorted(sum(order[i] for i in members) for members in balance(order, num_ranks))

    assert loads(costs) == loads(sorted(costs))


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

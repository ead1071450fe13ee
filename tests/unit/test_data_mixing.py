"""rlhf/data/mixing.py and streams over several sets: turns by weight, epochs and orders of each set's own."""

from __future__ import annotations

import json
import pickle
import random
from collections import Counter
from dataclasses import replace

import pytest

from rlhf.data.mixing import Turns
from rlhf.data.prompts import skipped_rows
from rlhf.data.stream import MixtureShare, Stream, StreamOrder, given_rows, pack_rows, unpack_rows
from rlhf.errors import UserError
from rlhf.types import Prompt

BIG = MixtureShare(name="big", weight=3.0, size=10)
SMALL = MixtureShare(name="small", weight=1.0, size=2)


def mixture(*shares: MixtureShare, seed: int = 0, shuffle: bool = True) -> Stream[Prompt]:
    size = sum(share.size for share in shares)
    items = [Prompt(prompt_id=i, token_ids=(i,), text=str(i), columns={}) for i in range(size)]
    return Stream(items, seed=seed, shuffle=shuffle, shares=shares)


def ids(stream: Stream[Prompt], count: int) -> list[tuple[int, int]]:
    return [(epoch, prompt.prompt_id) for epoch, prompt in stream.next(count)]


def turns(weights: list[float], count: int) -> list[int]:
    order = Turns(weights)
    return [order.next() for _ in range(count)]


def test_turns_by_hand() -> None:
    # Weights 2, 1, shares 2/3, 1/3. Set 0 is due by 1.5 and 3, set 1 by 3. Turn 0: set 0. Turn 1: set 0's second may
    # be given from 1.5 on, which is in turn 1; both are due by 3, and the earlier set goes first. Turn 2: set 1.
    assert turns([2, 1], 6) == [0, 0, 1, 0, 0, 1]
    assert turns([1, 1, 1], 6) == [0, 1, 2, 0, 1, 2]
    # Shares 1/4, 3/4: set 0 is due by 4, set 1 by 4/3, 8/3 and 4, its third not before turn 2, where set 0 goes first.
    assert turns([1, 3], 8) == [1, 1, 0, 1, 1, 1, 0, 1]
    assert turns([0.1, 0.3], 4) == [1, 1, 0, 1]  # a tenth and three, not the binary fractions beside them
    assert turns([7.0], 3) == [0, 0, 0]


def test_going_to_a_turn_is_having_given_the_ones_before() -> None:
    for count in (0, 1, 7, 12, 31):
        went, gave = Turns([2.5, 1, 0.7]), Turns([2.5, 1, 0.7])
        went.go_to(count)
        for _ in range(count):
            gave.next()
        assert went.counts == gave.counts
        assert [went.next() for _ in range(9)] == [gave.next() for _ in range(9)]


def test_a_small_set_begins_anew_as_often_as_its_weight_asks() -> None:
    taken = ids(mixture(BIG, SMALL), 40)
    assert sum(i >= 10 for _, i in taken) == 10  # a quarter
    # 30 of the big set's 10 rows are 3 epochs, 10 of the small set's 2 are 5; each holds every row once.
    assert Counter((epoch, i) for epoch, i in taken if i < 10) == Counter((e, i) for e in range(3) for i in range(10))
    assert Counter((epoch, i) for epoch, i in taken if i >= 10) == Counter((e, i) for e in range(5) for i in (10, 11))


def test_without_shuffling_each_set_keeps_its_order() -> None:
    taken = ids(mixture(BIG, SMALL, shuffle=False), 12)
    assert taken == [(0, i) for i in (0, 1, 2, 10, 3, 4, 5, 11, 6, 7, 8)] + [(1, 10)]


SETS = [(BIG,), (BIG, SMALL)]


@pytest.mark.parametrize("shares", SETS)
def test_the_order_does_not_depend_on_the_sizes_asked_for(shares: tuple[MixtureShare, ...]) -> None:
    parts = mixture(*shares)
    assert [pair for n in (1, 9, 0, 3, 22) for pair in ids(parts, n)] == ids(mixture(*shares), 35)


@pytest.mark.parametrize("shares", SETS)
@pytest.mark.parametrize("taken", [0, 3, 10, 12, 13, 40, 100])
def test_a_restored_stream_goes_on_where_the_other_stood(taken: int, shares: tuple[MixtureShare, ...]) -> None:
    stream, other = mixture(*shares), mixture(*shares)
    stream.next(taken)
    other.next(7)
    other.restore(pickle.loads(pickle.dumps(stream.state())))
    assert other.state() == stream.state()
    assert ids(other, 25) == ids(stream, 25)


def test_sets_of_one_size_are_shuffled_independently() -> None:
    taken = ids(mixture(replace(BIG, weight=1.0), replace(BIG, name="other", weight=1.0)), 20)
    assert [i for _, i in taken if i < 10] != [i - 10 for _, i in taken if i >= 10]


@pytest.mark.parametrize("shares", SETS)
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_given_items_are_known_without_the_data(shares: tuple[MixtureShare, ...], shuffle: bool) -> None:
    stream = mixture(*shares, seed=5, shuffle=shuffle)
    taken = ids(stream, 31)
    resumed = mixture(*shares, seed=5, shuffle=shuffle)
    resumed.restore(stream.state())
    for one in (stream, resumed):
        assert given_rows(json.loads(json.dumps(one.order.state()))) == taken


@pytest.mark.parametrize("rows", [[], [0], [7], [8], [2, 17, 23], list(range(64))])
def test_packed_rows_come_back(rows: list[int]) -> None:
    assert unpack_rows(pack_rows(rows)) == rows


def test_a_checkpoint_has_room_for_many_skipped_rows() -> None:
    """A mask of 100,000 rows with a tenth skipped has 7.3 kB of entropy in base 85. A list has 69 kB."""
    rows = sorted(random.Random(0).sample(range(100_000), 10_000))
    state = StreamOrder(
        [MixtureShare(name="", weight=1.0, size=90_000)], seed=0, shuffle=True, skipped_rows=rows
    ).state()
    assert len(json.dumps(state)) < 10_000


@pytest.mark.parametrize("shuffle", [True, False])
def test_given_rows_have_the_numbers_of_the_data_with_its_skipped_rows(shuffle: bool) -> None:
    rows = [0, 1, 3, 4, 5, 6, 7, 8, 9, 11, 12, 14]  # two of them are of the small set
    items = [Prompt(prompt_id=row, token_ids=(row,), text="", columns={}) for row in rows]
    skipped = skipped_rows(items)
    assert skipped == [2, 10, 13]
    stream = Stream(items, seed=5, shuffle=shuffle, shares=(BIG, SMALL), skipped_rows=skipped)
    taken = ids(stream, 31)
    assert given_rows(json.loads(json.dumps(stream.order.state()))) == taken
    assert [stream.at(row).prompt_id for row in rows] == rows
    with pytest.raises(IndexError):
        stream.at(10)
    with pytest.raises(UserError, match="belongs to other data"):
        Stream(items, seed=5, shuffle=shuffle, shares=(BIG, SMALL)).restore(stream.state())


def test_a_single_set_is_a_stream_as_it_always_was() -> None:
    assert ids(mixture(BIG), 25) == ids(Stream(mixture(BIG)._items, seed=0, shuffle=True), 25)


@pytest.mark.parametrize(
    "other",
    [
        mixture(replace(BIG, weight=2.0), SMALL),
        mixture(replace(BIG, name="large"), SMALL),
        mixture(replace(BIG, size=2), replace(SMALL, size=10)),
        mixture(replace(BIG, size=12)),
        mixture(BIG, SMALL, seed=1),
    ],
    ids=lambda s: "",
)
def test_a_cursor_of_another_mixture_is_refused(other: Stream[Prompt]) -> None:
    with pytest.raises(UserError, match="the weights of data sets"):
        other.restore(mixture(BIG, SMALL).state())


def test_shares_must_be_of_all_items() -> None:
    with pytest.raises(ValueError, match=r"shares of \[10, 2\] items do not make 13"):
        Stream([Prompt(prompt_id=0, token_ids=(), text="", columns={})] * 13, seed=0, shuffle=True, shares=(BIG, SMALL))


def test_the_order_is_pinned() -> None:
    # Checkpoints rely on it, as on that of a single set.
    assert [i for _, i in ids(mixture(BIG, SMALL), 12)] == [8, 3, 7, 11, 6, 9, 1, 10, 2, 5, 0, 10]

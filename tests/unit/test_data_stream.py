"""Streams over one set or several: turns by weight, each item once an epoch of its set, from any cursor."""

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


def prompts(ids: list[int], *, first_token: int = 0) -> list[Prompt]:
    return [Prompt(prompt_id=i, token_ids=(first_token, i), text=str(i), columns={}) for i in ids]


def mixture(*shares: MixtureShare, seed: int = 0, shuffle: bool = True) -> Stream[Prompt]:
    items = prompts([*range(sum(share.size for share in shares))])
    return Stream(items, seed=seed, shuffle=shuffle, shares=shares)


def single(count: int = 10, *, seed: int = 0, shuffle: bool = True, first_token: int = 0) -> Stream[Prompt]:
    return Stream(prompts([*range(count)], first_token=first_token), seed=seed, shuffle=shuffle)


def ids(stream: Stream[Prompt], count: int) -> list[tuple[int, int]]:
    return [(epoch, prompt.prompt_id) for epoch, prompt in stream.next(count)]


def test_turns_by_hand() -> None:
    def turns(weights: list[float], count: int) -> list[int]:
        order = Turns(weights)
        return [order.next() for _ in range(count)]

    # Weights 2, 1, shares 2/3, 1/3. Set 0 is due by 1.5 and 3, set 1 by 3. Turn 0: set 0. Turn 1: set 0's second may
    # be given from 1.5 on, which is in turn 1; both are due by 3, and the earlier set goes first. Turn 2: set 1.
    assert turns([2, 1], 6) == [0, 0, 1, 0, 0, 1]
    assert turns([1, 1, 1], 6) == [0, 1, 2, 0, 1, 2]
    # Shares 1/4, 3/4: set 0 is due by 4, set 1 by 4/3, 8/3 and 4, its third not before turn 2, where set 0 goes first.
    assert turns([1, 3], 8) == [1, 1, 0, 1, 1, 1, 0, 1]
    assert turns([0.1, 0.3], 4) == [1, 1, 0, 1]  # a tenth and three tenths, not the binary fractions nearby
    assert turns([7.0], 3) == [0, 0, 0]


def test_a_small_set_begins_anew_as_often_as_its_weight_asks() -> None:
    taken = ids(mixture(BIG, SMALL), 40)
    assert sum(i >= 10 for _, i in taken) == 10  # a quarter
    # 30 of the big set's 10 rows are 3 epochs, 10 of the small set's 2 are 5; each holds every row once.
    assert Counter((epoch, i) for epoch, i in taken if i < 10) == Counter((e, i) for e in range(3) for i in range(10))
    assert Counter((epoch, i) for epoch, i in taken if i >= 10) == Counter((e, i) for e in range(5) for i in (10, 11))


def test_orders_are_the_datas_or_one_for_each_seed_epoch_and_set() -> None:
    assert ids(single(3, shuffle=False), 7) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]
    taken = ids(mixture(BIG, SMALL, shuffle=False), 12)
    assert taken == [(0, i) for i in (0, 1, 2, 10, 3, 4, 5, 11, 6, 7, 8)] + [(1, 10)]
    shuffled = ids(single(), 30)
    orders = [tuple(i for epoch, i in shuffled if epoch == e) for e in range(3)]
    assert len({*orders, tuple(i for _, i in ids(single(seed=1), 10))}) == 4
    same_sizes = ids(mixture(replace(BIG, weight=1.0), replace(BIG, name="other", weight=1.0)), 20)
    assert [i for _, i in same_sizes if i < 10] != [i - 10 for _, i in same_sizes if i >= 10]
    # Checkpoints rely on the order: a different order at a cursor would train some prompts twice and others never.
    assert [i for _, i in ids(single(6), 12)] == [0, 5, 1, 4, 3, 2, 2, 0, 1, 5, 3, 4]
    assert [i for _, i in ids(mixture(BIG, SMALL), 12)] == [8, 3, 7, 11, 6, 9, 1, 10, 2, 5, 0, 10]
    assert ids(mixture(BIG), 25) == ids(single(), 25)


SETS = [(BIG,), (BIG, SMALL)]


@pytest.mark.parametrize("shares", SETS)
@pytest.mark.parametrize("taken", [0, 3, 10, 12, 13, 40, 100])
def test_a_restored_stream_goes_on_where_the_other_stood(taken: int, shares: tuple[MixtureShare, ...]) -> None:
    stream, other = mixture(*shares), mixture(*shares)
    stream.next(taken)
    other.next(7)
    other.restore(pickle.loads(pickle.dumps(stream.state())))
    assert other.state() == stream.state()
    assert [pair for n in (1, 9, 0, 15) for pair in ids(other, n)] == ids(stream, 25)


@pytest.mark.parametrize("shares", SETS)
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_given_items_are_known_without_the_data(shares: tuple[MixtureShare, ...], shuffle: bool) -> None:
    stream = mixture(*shares, seed=5, shuffle=shuffle)
    taken = ids(stream, 31)
    resumed = mixture(*shares, seed=5, shuffle=shuffle)
    resumed.restore(stream.state())
    for one in (stream, resumed):
        assert given_rows(json.loads(json.dumps(one.order.state()))) == taken


def test_packed_rows_come_back_and_are_small() -> None:
    """A mask of 100,000 rows with a tenth skipped has 7.3 kB of entropy in base 85. A list has 69 kB."""
    for few in ([], [0], [7], [8], [2, 17, 23], list(range(64))):
        assert unpack_rows(pack_rows(few)) == few
    rows = sorted(random.Random(0).sample(range(100_000), 10_000))
    whole = MixtureShare(name="", weight=1.0, size=90_000)
    assert len(json.dumps(StreamOrder([whole], seed=0, shuffle=True, skipped_rows=rows).state())) < 10_000


@pytest.mark.parametrize("shuffle", [True, False])
def test_given_rows_have_the_numbers_of_the_data_with_its_skipped_rows(shuffle: bool) -> None:
    rows = [0, 1, 3, 4, 5, 6, 7, 8, 9, 11, 12, 14]  # two prompts come from the small set
    items = prompts(rows)
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


@pytest.mark.parametrize(
    ("stream", "other"),
    [
        (single(), single(11)),
        (single(), single(seed=1)),
        (single(), single(shuffle=False)),
        (single(), single(first_token=9)),
        (mixture(BIG, SMALL), mixture(replace(BIG, weight=2.0), SMALL)),
        (mixture(BIG, SMALL), mixture(replace(BIG, name="large"), SMALL)),
        (mixture(BIG, SMALL), mixture(replace(BIG, size=2), replace(SMALL, size=10))),
        (mixture(BIG, SMALL), mixture(replace(BIG, size=12))),
        (mixture(BIG, SMALL), mixture(BIG, SMALL, seed=1)),
    ],
    ids=lambda s: "",
)
def test_a_cursor_of_other_data_is_refused(stream: Stream[Prompt], other: Stream[Prompt]) -> None:
    with pytest.raises(UserError, match=r"belongs to other data: .*the weights of data sets"):
        other.restore(stream.state())


def test_a_stream_has_items_and_shares_of_all_of_them() -> None:
    with pytest.raises(ValueError, match="at least one"):
        single(0)
    with pytest.raises(ValueError, match=r"shares of \[10, 2\] items do not make 13"):
        Stream(prompts([0] * 13), seed=0, shuffle=True, shares=(BIG, SMALL))

"""Every element belongs to the right rank: at borders of partitions, in padding, and in groups of several masters."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import pytest

from rlhf.engine.partitions import Groups, Piece, Sharding, partitions_of

GROUPS: Groups = [{"a": 5, "b": 3}, {"norm": 3}]
SHARDINGS = [Sharding(ranks=ranks, zero_stage=stage) for stage in range(4) for ranks in (1, 2, 3, 4, 7)]


def described(groups: Groups, *, ranks: int, zero_stage: int) -> list[tuple[Sequence[int], list[str]]]:
    """Return the sizes of each rank's masters, and the pieces as name[start:end]@master+offset."""
    return [
        (partition.sizes, [f"{p.parameter}[{p.start}:{p.end}]@{p.master}+{p.offset}" for p in partition.pieces])
        for partition in partitions_of(groups, Sharding(ranks=ranks, zero_stage=zero_stage))
    ]


def test_at_stage_0_each_rank_has_all() -> None:
    alone = ((5, 3, 3), ["a[0:5]@0+0", "b[0:3]@1+0", "norm[0:3]@2+0"])
    assert described(GROUPS, ranks=2, zero_stage=0) == [alone, alone]


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_at_stages_1_and_2_a_parameter_spans_ranks_and_a_group_is_padded(zero_stage: int) -> None:
    assert described(GROUPS, ranks=2, zero_stage=zero_stage) == [
        ((4, 2), ["a[0:4]@0+0", "norm[0:2]@1+0"]),
        ((4, 2), ["a[4:5]@0+0", "b[0:3]@0+1", "norm[2:3]@1+0"]),
    ]
    assert described([{"a": 1}], ranks=3, zero_stage=zero_stage) == [((2,), ["a[0:1]@0+0"]), ((2,), []), ((2,), [])]


def test_at_stage_3_each_parameter_is_divided_and_padded() -> None:
    assert described(GROUPS, ranks=2, zero_stage=3) == [
        ((5, 2), ["a[0:3]@0+0", "b[0:2]@0+3", "norm[0:2]@1+0"]),
        ((5, 2), ["a[3:5]@0+0", "b[2:3]@0+3", "norm[2:3]@1+0"]),
    ]
    assert described([{"a": 1, "b": 3}], ranks=3, zero_stage=3) == [
        ((2,), ["a[0:1]@0+0", "b[0:1]@0+1"]),
        ((2,), ["b[1:2]@0+1"]),
        ((2,), ["b[2:3]@0+1"]),
    ]


def test_at_stage_3_a_large_group_is_cut_into_masters() -> None:
    with mock.patch("rlhf.engine.partitions.SUB_GROUP_ELEMENTS", 4):
        assert described([{"a": 6, "b": 2, "c": 3}, {"d": 1}], ranks=2, zero_stage=3) == [
            ((4, 2, 1), ["a[0:3]@0+0", "b[0:1]@0+3", "c[0:2]@1+0", "d[0:1]@2+0"]),
            ((4, 2, 1), ["a[3:6]@0+0", "b[1:2]@0+3", "c[2:3]@1+0"]),
        ]
        assert described([{"a": 4}, {"d": 1}], ranks=1, zero_stage=3) == [((4, 1), ["a[0:4]@0+0", "d[0:1]@1+0"])]


@pytest.mark.parametrize("sharding", SHARDINGS, ids=str)
def test_no_element_is_lost_or_held_twice(sharding: Sharding) -> None:
    groups: Groups = [{"one": 1, "b": 29, "c": 8}, {"d": 3}]
    partitions = partitions_of(groups, sharding)[: None if sharding.zero_stage else 1]
    held = [(p.parameter, i) for partition in partitions for p in partition.pieces for i in range(p.start, p.end)]
    assert sorted(held) == sorted((name, i) for group in groups for name, numel in group.items() for i in range(numel))
    for partition in partitions:
        places = [(p.master, p.offset + i) for p in partition.pieces for i in range(p.numel)]
        assert len(set(places)) == len(places)
        assert all(offset < partition.sizes[master] for master, offset in places)


def test_a_part_of_a_piece_knows_its_place() -> None:
    piece = Piece(parameter="a", start=10, numel=8, master=2, offset=100)
    assert piece.within(12, 15) == Piece(parameter="a", start=12, numel=3, master=2, offset=102)

"""Limits of the simulation are closed forms, and improvements shorten the time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from rlhf.errors import UserError
from rlhf.planning.lengths import Lengths, parse_lengths
from rlhf.planning.simulate import simulate
from rlhf.planning.system import RecordedGroup, Schedule, System

ONE = System(
    lengths=Lengths(most=1000, mean=100.0),
    prompts_per_step=4,
    samples_per_prompt=2,
    prompt_tokens=10.0,
    engines=1,
    colocated=False,
    max_num_seqs=64,
    base_s=0.01,
    each_s=0.001,
    train_tokens_per_s=1000.0,
    sync_s=1.0,
    load_s=0.5,
)
MANY = replace(
    ONE,
    lengths=Lengths(most=4000, mean=500.0, sigma=1.0),
    prompts_per_step=32,
    samples_per_prompt=4,
    engines=8,
    train_tokens_per_s=10_000.0,
)


def test_one_gpu_without_spread_is_the_closed_form() -> None:
    # 8 responses of 100 tokens: 100 steps of 0.01 + 8 * 0.001 s. Training: 8 * 110 tokens at 1000 / s. Sync: 1 s.
    found = simulate(ONE, Schedule(), steps=5, seed=0)
    assert found.step_s == pytest.approx(1.8 + 0.88 + 1.0)
    assert found.engines_busy == pytest.approx(1.8 / 3.68)
    assert found.trainer_busy == pytest.approx(0.88 / 3.68)
    assert found.tokens_per_s == pytest.approx(880 / 3.68)
    assert found.lag == 0.0


def test_a_full_engine_takes_turns() -> None:
    # Two at a time: four waves of 100 steps of 0.01 + 2 * 0.001 s.
    found = simulate(replace(ONE, max_num_seqs=2), Schedule(), steps=3, seed=0)
    assert found.step_s == pytest.approx(4 * 1.2 + 0.88 + 1.0)
    assert found.engines_busy == pytest.approx(4.8 / 6.68)


@pytest.mark.parametrize("in_flight", [False, True])
def test_a_slow_trainer_hides_all_of_the_rollouts(in_flight: bool) -> None:
    # The trainer never waits for responses: a step is its 88 s and the sync.
    schedule = Schedule(max_staleness=1, in_flight=in_flight)
    found = simulate(replace(ONE, train_tokens_per_s=10.0), schedule, steps=4, seed=0)
    assert found.step_s == pytest.approx(88.0 + 1.0)
    assert found.trainer_busy == pytest.approx(88 / 89)
    assert found.lag == pytest.approx(1.0)


def test_the_longer_side_is_a_pipelined_step() -> None:
    # Engines finish before they get new weights, however far ahead they may be: 1.8 s of rollouts and 1 s of sync.
    for bound in (1, 3):
        found = simulate(ONE, Schedule(max_staleness=bound), steps=5, seed=0)
        assert found.step_s == pytest.approx(1.8 + 1.0)
        assert found.lag == pytest.approx(bound)


def test_streaming_hides_the_training_of_all_but_the_last_group() -> None:
    # One response at a time, of 100 steps of 0.011 s. A group of two is trained in 0.22 s, while the next one decodes.
    system = replace(ONE, max_num_seqs=1)
    turns, streamed = (simulate(system, Schedule(streamed=s), steps=3, seed=0) for s in (False, True))
    assert turns.step_s == pytest.approx(8.8 + 0.88 + 1.0)
    assert streamed.step_s == pytest.approx(8.8 + 0.22 + 1.0)
    assert streamed.lag == 0.0


def test_streaming_gains_nothing_where_all_groups_end_together() -> None:
    turns, streamed = (simulate(ONE, Schedule(streamed=s), steps=3, seed=0) for s in (False, True))
    assert streamed.step_s == pytest.approx(turns.step_s)


def test_only_a_share_of_the_training_is_streamed() -> None:
    # Half of each group's 0.22 s awaits the whole batch: 4 * 0.11 s, with the other half of the last group.
    system = replace(ONE, max_num_seqs=1, streamed_share=0.5)
    assert simulate(system, Schedule(streamed=True), steps=3, seed=0).step_s == pytest.approx(8.8 + 0.11 + 0.44 + 1.0)


def test_engines_in_flight_are_always_full() -> None:
    # Two at a time and two batches of 8 in flight: the engine pauses only for half a second at each sync.
    schedule = Schedule(max_staleness=1, in_flight=True)
    found = simulate(replace(ONE, max_num_seqs=2), schedule, steps=5, seed=0)
    assert found.step_s == pytest.approx(4 * 1.2 + 0.5)
    assert found.engines_busy == pytest.approx(4.8 / 5.3)


def test_a_prompt_is_computed_once_for_its_group() -> None:
    found = simulate(replace(ONE, prefill_s=0.01), Schedule(), steps=3, seed=0)
    assert found.step_s == pytest.approx(1.8 + 4 * 10 * 0.01 + 0.88 + 1.0)


def test_computing_keys_and_values_again_takes_the_time_of_a_prefill() -> None:
    schedule = Schedule(max_staleness=1, in_flight=True)
    kept, again = (
        simulate(replace(ONE, max_num_seqs=2, prefill_s=0.01, recomputes=r), schedule, steps=6, seed=0).step_s
        for r in (False, True)
    )
    assert kept + 0.1 < again < kept + (2 * 100 + 10) * 0.01  # two responses of at most 100 tokens, and their prompt


def test_recorded_groups_are_repeated_in_order() -> None:
    groups = tuple(RecordedGroup(lengths=(10 * k, 10 * k), latency_s=float(k)) for k in (1, 2, 3, 4))
    found = simulate(replace(ONE, recorded=groups), Schedule(), steps=3, seed=0)
    # All decode together: 8 sequences for 10 steps, 6, 4 and 2 for 10 more each. The last group then takes 4 s.
    rollouts = 10 * (4 * 0.01 + (8 + 6 + 4 + 2) * 0.001)
    assert found.step_s == pytest.approx(rollouts + 4.0 + (200 + 80) / 1000 + 1.0)


def test_a_service_delays_a_batch_but_no_engine() -> None:
    # Each group takes 10 s after it is decoded. In flight, three batches wait for the service at the same time.
    slow = replace(ONE, recorded=(RecordedGroup(lengths=(100, 100), latency_s=10.0),))
    turns = simulate(slow, Schedule(), steps=3, seed=0)
    assert turns.step_s == pytest.approx(1.8 + 10.0 + 0.88 + 1.0)
    found = simulate(slow, Schedule(max_staleness=2, in_flight=True), steps=9, seed=0)
    assert found.step_s < turns.step_s / 2


@pytest.mark.parametrize("sigma", [0.0, 1.0])
@pytest.mark.parametrize("rate", [2_000.0, 10_000.0, 100_000.0])
def test_more_overlap_is_never_slower(sigma: float, rate: float) -> None:
    system = replace(MANY, train_tokens_per_s=rate, lengths=replace(MANY.lengths, sigma=sigma))
    order = [
        *(Schedule(), Schedule(streamed=True), Schedule(max_staleness=1), Schedule(max_staleness=1, in_flight=True)),
        Schedule(max_staleness=2, in_flight=True),
    ]
    turns, streamed, pipelined, *in_flight = (
        simulate(system, one, steps=12, seed=0, warm_up=6).step_s for one in order
    )
    assert turns >= max(streamed, pipelined) - 1e-6
    assert min(streamed, pipelined) >= 0.999 * in_flight[0]
    assert in_flight[0] >= 0.999 * in_flight[1]


def test_the_order_of_completion_is_faster_and_within_the_bound() -> None:
    prompt, completion = (
        simulate(MANY, Schedule(max_staleness=1, in_flight=True, by_completion=c), steps=20, seed=0)
        for c in (False, True)
    )
    assert completion.step_s < prompt.step_s
    assert completion.lag < 1.0


def test_spread_costs_and_staleness_buys_it_back() -> None:
    even = simulate(replace(MANY, lengths=Lengths(most=4000, mean=500.0)), Schedule(), steps=6, seed=0)
    modes = [Schedule(), *(Schedule(max_staleness=bound, in_flight=True) for bound in (1, 2))]
    steps = [simulate(MANY, mode, steps=6, seed=0) for mode in modes]
    assert steps[0].step_s > 1.5 * even.step_s
    assert steps[0].step_s > steps[1].step_s > steps[2].step_s
    assert [round(one.lag) for one in steps] == [0, 1, 2]
    for one in steps:
        assert all(0.0 <= part <= 1.0 + 1e-9 for part in (one.engines_busy, one.trainer_busy))


def test_lengths_are_cut_and_keep_their_mean(tmp_path: Path) -> None:
    assert parse_lengths("lognormal:500:0.5", most=10**6).average() == pytest.approx(500, rel=0.03)
    assert parse_lengths("lognormal:500:0.5", most=100).average() <= 100
    file = tmp_path / "lengths.jsonl"
    file.write_text("3\n" + json.dumps({"response_tokens": 5}) + "\n\n")
    seen = parse_lengths(str(file), most=4)
    assert seen.seen == (3, 5)
    assert {seen.draw(Random(seed)) for seed in range(20)} == {3, 4}
    file.write_text(json.dumps({"response": "one\u2028two\x85", "response_tokens": 5}, ensure_ascii=False) + "\n")
    assert parse_lengths(str(file), most=9).seen == (5,)  # no line ends there
    (tmp_path / "samples").mkdir()
    rows = [{"split": "heldout", "response_tokens": 7}, {"split": "train", "response_tokens": 6}]
    (tmp_path / "samples" / "step_000001.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert parse_lengths(str(tmp_path), most=9).seen == (6,)  # evaluations sample otherwise, and far more


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("lognormal:5", "expected lognormal:MEAN:SIGMA"),
        ("lognormal:0:1", "expected a mean from 1 and a sigma from 0 to 5"),
        ("nowhere.txt", "nowhere.txt: cannot be read: No such file"),
        ("{bad}", r"bad.jsonl:2: expected a number, or an object with `response_tokens`, got 'x'"),
        ("{empty}", "it has no lengths"),
        ("{endless}", "endless:1: expected a number"),
        ("{binary}", "binary: is not text: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_wrong_lengths(tmp_path: Path, text: str, error: str) -> None:
    (tmp_path / "bad.jsonl").write_text("3\nx\n")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "endless").write_text("1e999\n")
    (tmp_path / "binary").write_bytes(b"\xff\n")
    names = {"bad": "bad.jsonl", "empty": "empty", "endless": "endless", "binary": "binary"}
    named = text.format(**{key: tmp_path / name for key, name in names.items()})
    with pytest.raises(UserError, match=error):
        parse_lengths(named, most=10)

"""`rlhf plan` names the schedule of a run, models that are not packed, and simulates: its limits are closed forms."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from rlhf.commands.plan import plan
from rlhf.config.files.load import load
from rlhf.config.schema.root import Config
from rlhf.errors import UserError
from rlhf.models.packed.row_layout import refuse_unpackable
from rlhf.planning.lengths import Lengths, parse_lengths
from rlhf.planning.schedules import correction_in_force, schedule_of, schedules
from rlhf.planning.simulate import simulate
from rlhf.planning.system import RecordedGroup, Schedule, System
from tests.fixtures.sources import ROOT
from tests.tiny_architectures import tiny_config

AHEAD = ("rollouts.max_staleness=1",)
FLIGHT = ("rollouts.max_staleness=2", "rollouts.weight_updates=in_flight")


def run(*keys: str, name: str = "grpo_smollm2") -> Config:
    return next(iter(load(ROOT / f"configs/{name}.yaml", keys).runs.values()))


@pytest.mark.parametrize(
    ("keys", "name", "correction"),
    [
        ((), "in turns", "not needed"),
        (("train.streamed=true",), "streamed", "not needed"),
        ((*AHEAD, "algorithm.correction=none"), "pipelined, 1 ahead", "none"),
        ((*FLIGHT, "algorithm.correction=none"), "in flight, 2 ahead", "none"),
        (
            (*FLIGHT, "algorithm.correction.mode=bypass", "rollouts.batch_order=completion"),
            "in flight, 2 ahead, by completion",
            "mode bypass",
        ),
        (("rollouts.oversample=1.5", "rollouts.carry_over=true", "algorithm.correction=none"), "in turns", "none"),
        ((*AHEAD, "algorithm.correction.preset=token_tis"), "pipelined, 1 ahead", "preset token_tis, mode decoupled"),
    ],
)
def test_the_schedule_and_the_correction_of_a_run(keys: tuple[str, ...], name: str, correction: str) -> None:
    config = run(*keys)
    assert str(schedule_of(config)) == name
    assert correction_in_force(config, config.rollouts) == correction


def test_schedules_of_a_bound_have_the_runs_order_and_an_algorithm_without_a_correction_says_so() -> None:
    config = run(*AHEAD, name="online_dpo_smollm2")
    assert correction_in_force(config, config.rollouts) == "none: online_dpo has no correction"
    config = run(*FLIGHT, "algorithm.correction=none", "rollouts.batch_order=completion")
    names = [str(one) for one in schedules(config, [0, 2])]
    assert names == ["in turns", "streamed", "pipelined, 2 ahead", "in flight, 2 ahead, by completion"]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("grpo_smollm2", ("cluster.device=cuda", "cluster.roles.rollout.colocate_with=policy")),
        ("online_dpo_smollm2", ()),
    ],
)
def test_a_run_that_cannot_be_streamed_has_no_such_schedule(name: str, keys: tuple[str, ...]) -> None:
    assert [str(one) for one in schedules(run(*keys, name=name), [0])] == ["in turns"]


def plan_of(folder: Path, kind: str, **changes: str) -> str:
    tiny_config(kind).save_pretrained(folder / "model")
    stored = folder / "model" / "config.json"
    stored.write_text(json.dumps(json.loads(stored.read_text()) | changes))
    (folder / "run.yaml").write_text(
        f"run: {{name: x}}\npolicy: {{model: {folder}/model}}\nalgorithm: {{name: dpo}}\ndata: {{train: pairs.jsonl}}\n"
        "train: {steps: 1, lr: 1e-4, sequences_per_update: 2}\n"
    )
    return plan(folder / "run.yaml")


@pytest.mark.parametrize(
    ("kind", "changes", "line"),
    [
        ("bloom", {}, "sequences are computed one by one, which is slower: bloom adds a bias by position"),
        ("gptj", {}, "responses to a prompt do not share its tokens: gptj"),
        ("llama", {"model_type": "llama_of_tomorrow"}, "no test has run with models of type llama_of_tomorrow"),
    ],
)
def test_the_plan_names_a_model_whose_rows_are_special(
    tmp_path: Path, kind: str, changes: dict[str, str], line: str
) -> None:
    assert f"policy: {line}" in plan_of(tmp_path, kind, **changes)


@pytest.mark.parametrize("model_type", ["llama", "qwen3_5_text"])
def test_the_plan_says_nothing_of_a_model_that_is_packed(tmp_path: Path, model_type: str) -> None:
    text = plan_of(tmp_path, model_type)
    assert "layout of sequences" not in text
    assert "no test has run" not in text


def test_ranks_cannot_share_the_rows_of_a_model_that_is_not_packed() -> None:
    refuse_unpackable(tiny_config("qwen3_5_text").to_dict(), 1)
    refuse_unpackable(tiny_config("gptj").to_dict(), 2)
    with pytest.raises(UserError, match=r"sequence_parallel is 2, .* qwen3_5_text has layers other than attention"):
        refuse_unpackable(tiny_config("qwen3_5_text").to_dict(), 2)


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


IN_FLIGHT = Schedule(max_staleness=1, in_flight=True)
SLOW = {"recorded": (RecordedGroup(lengths=(100, 100), latency_s=10.0),)}
FORMS: dict[str, tuple[dict[str, Any], Schedule, float, float | None]] = {
    # 8 responses of 100 tokens: 100 steps of 0.01 + 8 * 0.001 s. Training: 8 * 110 tokens at 1000 / s. Sync: 1 s.
    "turns": ({}, Schedule(), 1.8 + 0.88 + 1.0, 1.8 / 3.68),
    # Two at a time: four waves of 100 steps of 0.01 + 2 * 0.001 s.
    "a full engine": ({"max_num_seqs": 2}, Schedule(), 4 * 1.2 + 0.88 + 1.0, 4.8 / 6.68),
    # The trainer never waits for responses: a step is its 88 s and the sync.
    "a slow trainer": ({"train_tokens_per_s": 10.0}, Schedule(max_staleness=1), 88.0 + 1.0, None),
    "a slow trainer in flight": ({"train_tokens_per_s": 10.0}, IN_FLIGHT, 88.0 + 1.0, None),
    # Engines finish before they get new weights, however far ahead they may be: 1.8 s of rollouts and 1 s of sync.
    "1 ahead": ({}, Schedule(max_staleness=1), 1.8 + 1.0, None),
    "3 ahead": ({}, Schedule(max_staleness=3), 1.8 + 1.0, None),
    # One response at a time, of 100 steps of 0.011 s. A group of two is trained in 0.22 s, while the next one decodes.
    "one after another": ({"max_num_seqs": 1}, Schedule(), 8.8 + 0.88 + 1.0, None),
    "streamed": ({"max_num_seqs": 1}, Schedule(streamed=True), 8.8 + 0.22 + 1.0, None),
    "streamed, all end together": ({}, Schedule(streamed=True), 1.8 + 0.88 + 1.0, None),
    # Half of each group's 0.22 s awaits the whole batch: 4 * 0.11 s, with the other half of the last group.
    "half streamed": ({"max_num_seqs": 1, "streamed_share": 0.5}, Schedule(streamed=True), 8.8 + 0.11 + 0.44 + 1, None),
    # Two at a time and two batches of 8 in flight: the engine pauses only for half a second at each sync.
    "in flight": ({"max_num_seqs": 2}, IN_FLIGHT, 4 * 1.2 + 0.5, 4.8 / 5.3),
    "prompts, once a group": ({"prefill_s": 0.01}, Schedule(), 1.8 + 4 * 10 * 0.01 + 0.88 + 1.0, None),
    "a slow service": (SLOW, Schedule(), 1.8 + 10.0 + 0.88 + 1.0, None),
    # All decode together: 8 sequences for 10 steps, 6, 4 and 2 for 10 more each. The last group then takes 4 s.
    "recorded groups": (
        {"recorded": tuple(RecordedGroup(lengths=(10 * k, 10 * k), latency_s=float(k)) for k in (1, 2, 3, 4))},
        *(Schedule(), 10 * (4 * 0.01 + (8 + 6 + 4 + 2) * 0.001) + 4.0 + (200 + 80) / 1000 + 1.0, None),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_one_engine_without_spread_has_the_closed_form(form: str) -> None:
    changes, schedule, step_s, engines_busy = FORMS[form]
    outcome = simulate(replace(ONE, **changes), schedule, steps=5, seed=0)
    assert outcome.step_s == pytest.approx(step_s)
    assert engines_busy is None or outcome.engines_busy == pytest.approx(engines_busy)
    if "recorded" not in changes:
        tokens = 880
        assert outcome.tokens_per_s == pytest.approx(tokens / step_s)
        rate = changes.get("train_tokens_per_s", ONE.train_tokens_per_s)
        assert outcome.trainer_busy == pytest.approx(tokens / rate / step_s)
        assert outcome.lag == pytest.approx(schedule.max_staleness)


def test_computing_keys_and_values_again_takes_the_time_of_a_prefill() -> None:
    kept, again = (
        simulate(replace(ONE, max_num_seqs=2, prefill_s=0.01, recomputes=r), IN_FLIGHT, steps=6, seed=0).step_s
        for r in (False, True)
    )
    assert kept + 0.1 < again < kept + (2 * 100 + 10) * 0.01  # two responses of at most 100 tokens, and their prompt


def test_in_flight_several_batches_wait_for_a_slow_service_at_once() -> None:
    outcome = simulate(replace(ONE, **SLOW), Schedule(max_staleness=2, in_flight=True), steps=9, seed=0)
    assert outcome.step_s < FORMS["a slow service"][2] / 2


@pytest.mark.parametrize("sigma", [0.0, 1.0])
@pytest.mark.parametrize("rate", [2_000.0, 10_000.0, 100_000.0])
def test_more_overlap_is_never_slower(sigma: float, rate: float) -> None:
    system = replace(MANY, train_tokens_per_s=rate, lengths=replace(MANY.lengths, sigma=sigma))
    order = [
        Schedule(),
        Schedule(streamed=True),
        Schedule(max_staleness=1),
        IN_FLIGHT,
        replace(IN_FLIGHT, max_staleness=2),
    ]
    turns, streamed, pipelined, *in_flight = (
        simulate(system, schedule, steps=12, seed=0, warm_up=6).step_s for schedule in order
    )
    assert turns >= max(streamed, pipelined) - 1e-6
    assert min(streamed, pipelined) >= 0.999 * in_flight[0]
    assert in_flight[0] >= 0.999 * in_flight[1]


def test_the_order_of_completion_is_faster_and_within_the_bound() -> None:
    prompt, completion = (simulate(MANY, replace(IN_FLIGHT, by_completion=c), steps=20, seed=0) for c in (False, True))
    assert completion.step_s < prompt.step_s
    assert completion.lag < 1.0


def test_spread_costs_and_staleness_buys_it_back() -> None:
    even = simulate(replace(MANY, lengths=Lengths(most=4000, mean=500.0)), Schedule(), steps=6, seed=0)
    modes = [Schedule(), *(Schedule(max_staleness=bound, in_flight=True) for bound in (1, 2))]
    steps = [simulate(MANY, mode, steps=6, seed=0) for mode in modes]
    assert steps[0].step_s > max(1.5 * even.step_s, steps[1].step_s)
    assert steps[1].step_s > steps[2].step_s
    assert [round(outcome.lag) for outcome in steps] == [0, 1, 2]


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
    assert parse_lengths(str(tmp_path), most=9).seen == (6,)  # evaluations sample differently, and far more often


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("lognormal:5", "expected lognormal:MEAN:SIGMA"),
        ("lognormal:0:1", "expected a mean from 1 and a sigma from 0 to 5"),
        ("nowhere.txt", "nowhere.txt: cannot be read: No such file"),
        ("{bad}", r"bad:2: expected a number, or an object with `response_tokens`, got 'x'"),
        ("{empty}", "it has no lengths"),
        ("{endless}", "endless:1: expected a number"),
        ("{binary}", "binary: is not text: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_wrong_lengths(tmp_path: Path, text: str, error: str) -> None:
    files = {"bad": b"3\nx\n", "empty": b"\n", "endless": b"1e999\n", "binary": b"\xff\n"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=error):
        parse_lengths(text.format(**{name: tmp_path / name for name in files}), most=10)

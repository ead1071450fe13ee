"""A sweep's file makes trials. A wrong file is refused before a trial starts, with the key and the fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import main
from rlhf.config.files.load import load
from rlhf.config.files.sweep import load_sweep
from rlhf.errors import UserError
from rlhf.sweeps.space import known_trials
from tests.fixtures.sweeps import RUN, write_sweep


def test_a_trial_is_the_run_with_what_is_fixed_and_what_is_varied(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, set={"train.steps": 20, "train.weight_decay": 0.1})
    sweep = load_sweep(file, ["train.steps=30", "sweep.seed=4"])
    (run,) = sweep.trial({"train.lr": 0.5}, "trial-000").runs.values()
    assert (run.train.steps, run.train.weight_decay, run.train.lr) == (30, 0.1, 0.5)
    assert (run.run.name, run.run.dir) == ("trial-000", tmp_path / "rates" / "trials")
    assert sweep.config.seed == 4
    assert sweep.lower_is_better
    assert sweep.metric == "eval/heldout/loss"
    assert sweep.best({"train.lr": 0.5}).folder == Path("runs/tiny-rates")


def test_a_grid_that_is_too_large_is_refused_before_it_is_made(tmp_path: Path) -> None:
    parameters = {key: {"min": 1, "max": 10**9, "integer": True} for key in ("train.steps", "run.seed")}
    sweep = load_sweep(write_sweep(tmp_path, parameters=parameters, method={"name": "grid"}))
    with pytest.raises(UserError, match=r"sweep\.parameters: have 10{18} combinations, more than 10000"):
        known_trials(sweep)


def test_trials_that_are_told_to_wandb_are_one_group_of_it(tmp_path: Path) -> None:
    sweep = load_sweep(write_sweep(tmp_path), ["tracking.wandb=offline", "run.mirror=memory://runs/"])
    (run,) = sweep.trial({"train.lr": 0.5}, "trial-000").runs.values()
    assert run.tracking.wandb_group == "rates"
    assert run.run.mirror == "memory://runs/rates"  # other sweeps have trials of the same names


def test_a_run_may_stand_in_the_sweep_itself(tmp_path: Path) -> None:
    sweep = load_sweep(write_sweep(tmp_path, config=RUN, set={"data.system_prompt": "Be brief \U0001f600"}))
    run = sweep.base.runs["tiny"]
    assert (run.train.lr, run.data.system_prompt) == (1e-4, "Be brief \U0001f600")


def test_in_a_pipeline_the_last_stage_that_has_the_metric_is_judged(tmp_path: Path) -> None:
    first = {section: RUN[section] for section in ("algorithm", "data", "train", "policy")}
    second = {"data": {"train": RUN["data"]["train"]}, "policy": {"model": "stage:first", "dtype": "float32"}}
    stages = {"first": first, "second": first | second}
    config = {"run": RUN["run"], "stages": stages}
    parameters = {"stages.first.train.lr": {"values": [1e-3, 1e-2]}}
    sweep = load_sweep(write_sweep(tmp_path, config=config, parameters=parameters))
    assert sweep.judged == "first"
    assert sweep.trial({"stages.first.train.lr": 0.5}, "trial-000").runs["first"].train.lr == 0.5


def test_a_reward_of_the_run_is_a_metric_and_another_one_is_not(tmp_path: Path) -> None:
    online = RUN | {
        "algorithm": {"name": "grpo"},
        "data": {"train": {"task": "running_totals", "size": 64}},
        "rollouts": {"prompts_per_step": 4, "samples_per_prompt": 4, "max_new_tokens": 8},
        "rewards": {"correct": {"function": "exact_match"}},
    }
    online.pop("eval")
    assert load_sweep(write_sweep(tmp_path, config=online, metric="rewards/correct/mean")).judged == "tiny"
    with pytest.raises(UserError, match=r"got 'rewards/correkt/mean', but the rewards of the run are: correct"):
        load_sweep(write_sweep(tmp_path, config=online, metric="rewards/correkt/mean"))
    with pytest.raises(UserError, match="It is for runs with: there is a critic"):
        load_sweep(write_sweep(tmp_path, config=online, metric="experience/values/mean"))
    adapter = online | {"policy": RUN["policy"] | {"lora": {}}, "algorithm": {"name": "grpo", "kl": {"coef": 0.1}}}
    assert load_sweep(write_sweep(tmp_path, config=adapter, metric="experience/kl_ref/mean"))  # adapter off


def test_the_command_line_contradicts_no_key_of_the_sweep(tmp_path: Path) -> None:
    file = write_sweep(tmp_path, set={"train.steps": 20})
    with pytest.raises(
        UserError, match=r"argument train: sweep\.set gives train\.steps, and this argument would remove " r"that value"
    ):
        load_sweep(file, ["train={steps: 3, lr: 1e-3}"])
    with pytest.raises(UserError, match=r"argument train.lr: the sweep varies this key"):
        load_sweep(file, ["train.lr=1.0"])


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"metric": "eval/heldout/lss"}, r"sweep.metric: got 'eval/heldout/lss'; did you mean eval/heldout/loss\?"),
    ({"metric": "-nonsense"}, "sweep.metric: got 'nonsense', which is not a metric"),
    ({"metric": "update/ratio/histogram"}, "sweep.metric: got 'update/ratio/histogram', a histogram"),
    ({"metric": "rewards/score/mean"}, "sweep.metric: got 'rewards/score/mean', which this run does not record. It is"),
    ({"metric": "preference/accuracy/mean"}, "It is for runs with: training on pairs of responses"),
    ({"name": "a/b"}, "sweep.name: got 'a/b', expected letters"),
    ({"paramters": {}}, r"sweep.paramters: unknown key; did you mean sweep.parameters\?"),
    ({"config": "nowhere.yaml"}, "sweep.config: nowhere.yaml is not a file"),
    ({"parameters": {}}, "sweep.parameters"),
    ({"parameters": {"train.lrr": {"values": [1.0]}}}, r"train.lrr: unknown key; did you mean train.lr\?"),
    ({"parameters": {"train.lr": {"values": []}}}, "sweep.parameters.train.lr.values: is empty"),
    ({"parameters": {"train.lr": {"min": 1.0}}}, r"sweep.parameters.train.lr: expected `values: \[...\]`, or `min`"),
    ({"parameters": {"train.lr": {"min": 1.0, "max": 0.5}}}, "train.lr.max: is 0.5 and must be above min = 1"),
    ({"parameters": {"train.lr": {"min": 0.0, "max": 0.5, "scale": "log"}}}, "train.lr.min: is 0, and a log scale"),
    ({"parameters": {"train.lr": {"values": [1.0], "scale": "log"}}}, "train.lr.scale: has no effect together with"),
    ({"parameters": {"train.lr": {"min": 1e-3, "max": 0.5, "scale": "log", "step": 0.1}}}, "step: has no effect on"),
    ({"parameters": {"train.steps": {"min": 0.5, "max": 2, "integer": True}}}, "train.steps.integer: is true, but"),
    ({"parameters": {"run.name": {"values": ["a"]}}}, "run.name: is given to each trial by the sweep"),
    ({"set": {"train.lr": 1.0}}, "train.lr: is fixed by sweep.set too"),
    ({"set": {"run.dir": "x"}}, "sweep.set.run.dir: is given to each trial"),
    ({"set": {"train.stps": 1}}, r"train.stps: unknown key; did you mean train.steps\?"),
    ({"method": {"name": "grid"}}, "train.lr: is an infinite range, and a grid tries every number"),
    ({"method": {"name": "gird"}}, "sweep.method.name: got 'gird'; did you mean `grid`. Expected `grid`, `random`"),
    ({"method": {"name": "grid", "trials": 3}}, "sweep.method.trials: is a key of"),
    ({"method": {"name": "asha", "trials": 3, "grace_steps": 9}}, "grace_steps: is 9, but a trial has only 9 steps"),
    ({"method": {"name": "asha", "trials": 3, "grace_steps": 3}}, "grace_steps: is 3, but .* measured every 2 steps"),
]


@pytest.mark.parametrize(("changes", "said"), WRONG)
def test_what_is_wrong_is_said_with_its_key(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_sweep(write_sweep(tmp_path, **changes))


@pytest.mark.parametrize(
    ("parameter", "said"),
    [
        ({"train.lr": {"min": -1.0, "max": 1e-3}}, "train.lr=-1.0 is not a valid run: .*train.lr: got -1.0, expected"),
        ({"eval.every": {"values": [2, 0]}}, "eval.every=0 is not a valid run: .*expected an integer >= 1"),
        ({"train.warmup_steps": {"min": 0, "max": 9, "integer": True}}, "warmup_steps=9 is not a valid run: .*is 9"),
    ],
)
def test_every_end_of_a_range_is_checked_first(tmp_path: Path, parameter: dict[str, Any], said: str) -> None:
    file = write_sweep(tmp_path, parameters=parameter)
    with pytest.raises(UserError, match=said):
        known_trials(load_sweep(file))
    assert main(["sweep", str(file)]) == 2
    assert not (tmp_path / "rates").exists()


def test_runs_and_sweeps_are_not_taken_for_each_other(tmp_path: Path) -> None:
    file = write_sweep(tmp_path)
    with pytest.raises(UserError, match="use `rlhf sweep"):
        load(file)
    with pytest.raises(UserError, match="use `rlhf train"):
        load_sweep(tmp_path / "run.yaml")

"""`rlhf plan` names the schedule and the correction of a run, and models whose sequences are not packed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.commands.plan import plan
from rlhf.config.files.load import load
from rlhf.config.schema.root import Config
from rlhf.errors import UserError
from rlhf.models.packed.row_layout import refuse_unpackable
from rlhf.planning.schedules import correction_in_force, schedule_of, schedules
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


def test_an_algorithm_without_a_correction_says_so() -> None:
    config = run(*AHEAD, name="online_dpo_smollm2")
    assert correction_in_force(config, config.rollouts) == "none: online_dpo has no correction"


def test_the_schedules_of_a_bound_have_the_runs_order() -> None:
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

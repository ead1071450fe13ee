"""A run reads a single data set, or several, before anything starts."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.files.load import load
from rlhf.data.stream import MixtureShare
from rlhf.errors import UserError
from rlhf.preflight.inputs import load_inputs
from rlhf.preflight.training_data import OfflineInputs, OnlineInputs

SFT = """\
run: {name: demo, dir: DIR}
policy: {model: "tiny:llama", dtype: float32}
algorithm: {name: sft}
data: {train: {a: {source: DIR/a.jsonl, weight: 3}, b: {source: DIR/b.jsonl}}, max_unusable_fraction: 0.5}
train: {steps: 1, lr: 1e-3, sequences_per_update: 2, max_tokens_per_microbatch: 64}
"""
GRPO = """\
run: {name: demo, dir: DIR}
policy: {model: "tiny:llama", dtype: float32}
algorithm: {name: grpo}
data: {train: {a: {source: DIR/a.jsonl}, b: {source: DIR/b.jsonl}}, max_prompt_tokens: 32}
rollouts: {prompts_per_step: 2, samples_per_prompt: 2, max_new_tokens: 8}
rewards: {correct: {function: exact_match}}
train: {steps: 1, lr: 1e-3, sequences_per_update: 4, max_tokens_per_microbatch: 64}
"""


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def stage(tmp_path: Path, text: str, *overrides: str, steps: str = "steps: 1") -> Any:
    (tmp_path / "run.yaml").write_text(text.replace("DIR", str(tmp_path)).replace("steps: 1", steps))
    (only,) = load_inputs(load(tmp_path / "run.yaml", overrides))
    return only


def inputs(tmp_path: Path, text: str, *overrides: str) -> Any:
    return stage(tmp_path, text, *overrides).inputs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    row = {"prompt": "a", "completion": "b", "answer": "b"}
    write(tmp_path / "a.jsonl", [row, row | {"completion": ""}, row | {"completion": "c"}])
    write(tmp_path / "b.jsonl", [row | {"completion": " "}, {"prompt": "x", "completion": "y", "answer": "y"}])
    return tmp_path


def test_epochs_count_the_rows_that_are_kept(folder: Path) -> None:
    run = stage(folder, SFT, steps="epochs: 3")
    assert (run.config.train.steps, run.config.train.epochs) == (5, None)  # 3 * 3 rows, 2 in each step
    assert (run.written.train.steps, run.written.train.epochs) == (None, 3.0)
    assert stage(folder, GRPO, steps="epochs: 1").config.train.steps == 3  # 5 prompts, 2 in each step
    with pytest.raises(UserError, match=r"train\.epochs is 1, which makes 2 steps: train\.warmup_steps: is 9"):
        stage(folder, SFT, steps="epochs: 1, warmup_steps: 9")


def test_sets_stand_one_behind_the_other_and_what_is_left_out_is_known(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = inputs(folder, SFT)
    assert isinstance(found, OfflineInputs)
    assert [example.example_id for example in found.rows] == [0, 1, 2]
    assert found.shares == (
        MixtureShare(name="data.train.a.source", weight=3.0, size=2),
        MixtureShare(name="data.train.b.source", weight=1.0, size=1),
    )
    assert [row.place for row in found.unusable] == [f"{folder}/a.jsonl:2", f"{folder}/b.jsonl:1"]
    assert "data.train.b.source: 1 of 2 rows cannot be used and are left out" in caplog.text
    with pytest.raises(UserError, match=r"data.train.b.source: .*b.jsonl:1: column `completion`"):
        inputs(folder, SFT, "data.max_unusable_fraction=0.4")  # a third of a, half of b
    prompts = inputs(folder, GRPO)
    assert isinstance(prompts, OnlineInputs)
    assert [prompt.prompt_id for prompt in prompts.prompts] == [0, 1, 2, 3, 4]
    assert [share.size for share in prompts.shares] == [3, 2]


def test_the_limit_of_tokens_is_the_micro_batch_unless_it_is_lower(folder: Path) -> None:
    write(folder / "b.jsonl", [{"prompt": "x" * 30, "completion": "y" * 30}])
    with pytest.raises(UserError, match=r"b.jsonl:1: the example has 64 tokens, more than .*: 63. Raise it"):
        inputs(folder, SFT, "data.max_sequence_tokens=63")
    assert len(inputs(folder, SFT).rows[-1].token_ids) == 64  # user, 30, eos, assistant, 30, eos
    cut = inputs(folder, SFT, "data.max_sequence_tokens=40", "data.too_long=cut").rows[-1]
    assert (len(cut.token_ids), sum(cut.loss_mask)) == (40, 7)


def test_a_curriculum_needs_prompts_that_come_up_twice(folder: Path) -> None:
    one = [f"data.train={folder}/a.jsonl", "data.curriculum={}"]
    accepted = ("train.steps=2", "rollouts.oversample=2", "rollouts.dynamic_sampling={}")
    # of mixed sets, a small one may come up twice
    for overrides in ([*one, accepted[0]], [*one, accepted[1]], [*one, accepted[2]], ["data.curriculum={}"]):
        assert isinstance(inputs(folder, GRPO, *overrides), OnlineInputs)
    with pytest.raises(UserError, match=r"data.train has 3 prompts, of which 1 steps need 2 at most, so none comes up"):
        inputs(folder, GRPO, *one)
    with pytest.raises(UserError, match="need 3 at most"):  # 2 * 1.1, rounded up
        inputs(folder, GRPO, *one, "reward_policy.on_error=drop")


SERVICE = "rewards={far: {url: 'http://127.0.0.1:9/'}}"


@pytest.mark.parametrize(
    ("metric", "keys", "message"),
    [
        ("/pass@4", [], None),
        ("/score", [], None),
        ("/correct", [], None),
        ("/pass@4", [SERVICE], r"'eval/heldout/pass@4', which no evaluation has: pass@k needs eval.pass_score"),
        ("/pass@4", [SERVICE, "eval.pass_score=1"], None),
        ("/maj@1", [], r"expected a metric of an evaluation.*eval/heldout/maj@2, eval/heldout/maj@4"),
        (".b/score", ["eval.by=answer"], None),
        (".c/score", ["eval.by=answer"], r"'eval/heldout.c/score', which no evaluation has. The metrics are: .*t.b/sc"),
    ],
)
def test_the_best_metric_is_one_that_the_evaluations_have(
    folder: Path, metric: str, keys: list[str], message: str | None
) -> None:
    best, held_out = f"train.best_metric=eval/heldout{metric}", f"data.eval={folder}/a.jsonl"
    with nullcontext() if message is None else pytest.raises(UserError, match=message):
        inputs(folder, GRPO, held_out, "eval.samples_per_prompt=4", "eval.temperature=1", *keys, best)


def test_a_teacher_is_not_asked_at_a_temperature_of_each_prompt(folder: Path) -> None:
    write(folder / "a.jsonl", [{"prompt": "a", "answer": "b", "temperature": 0.5}])
    assert inputs(folder, GRPO).prompts[0].temperature == 0.5
    taught = ["algorithm={name: on_policy_distillation}", "teacher={model: 'tiny:llama', dtype: float32}"]
    with pytest.raises(UserError, match="column `temperature` is not for algorithm on_policy_distillation"):
        inputs(folder, GRPO, *taught)


def test_a_row_limits_its_responses_within_the_runs_limit(folder: Path) -> None:
    write(folder / "a.jsonl", [{"prompt": "a", "answer": "b", "max_new_tokens": 8}])
    held_out = f"data.eval={folder / 'a.jsonl'}"
    found = inputs(folder, GRPO, held_out)
    (evaluated,) = found.eval_sets.values()
    assert (found.prompts[0].max_new_tokens, evaluated.prompts[0].max_new_tokens) == (8, 8)
    with pytest.raises(UserError, match=r"data.train.a.source: .*:1: column `max_new_tokens` is 8, .* 1 to .*, 7,"):
        inputs(folder, GRPO, "rollouts.max_new_tokens=7")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), None),
        (("policy.lora={}",), None),
        (("rollouts.max_new_tokens=2048", "train.max_tokens_per_microbatch=4096"), "takes at most 2048 tokens"),
        (("cluster.roles.policy={workers: 3, sequence_parallel: 3}",), "must divide the model's 4 attention heads"),
        (("policy.router_balance_coef=0.1",), "is no mixture of experts"),
        (("policy.lora={target_modules: [nothing]}",), "nothing"),
        (("policy.lora={quantize: nf4}",), "has linear layers 96 wide"),
    ],
)
def test_checks_alone_accept_and_refuse_what_a_run_does(
    folder: Path, overrides: tuple[str, ...], message: str | None
) -> None:
    write(folder / "b.jsonl", [{"prompt": "x", "answer": "y"}])
    (folder / "run.yaml").write_text(GRPO.replace("DIR", str(folder)))
    loaded, read = load(folder / "run.yaml", overrides), []
    for only_checks in (True, False):
        with nullcontext() if message is None else pytest.raises(UserError, match=message):
            (only,) = load_inputs(loaded, only_checks=only_checks)
            read.append(only.inputs)
    assert read[:1] == read[1:]
    assert {path.name for path in folder.glob("demo/models/*")} == {"tiny-llama", "tiny-llama-0"}

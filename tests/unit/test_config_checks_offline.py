"""Impossible relations of algorithms on fixed data are refused: preferences and distillation."""

from __future__ import annotations

import pytest

from tests.fixtures.configs import CUDA, changed, refusal

PREFERENCES = """\
run: {name: demo}
policy: {model: some/model}
algorithm: {name: dpo}
data: {train: pairs.jsonl, eval: heldout.jsonl}
train: {steps: 10, lr: 1.0e-6, sequences_per_update: 16}
"""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.loss=exo"], "algorithm: `loss: exo` needs `label_smoothing` above 0"),
        (["algorithm.loss={}"], "algorithm: `loss` is an empty mapping"),
        (["algorithm.loss={ipo: 0.5, sigmo: 1}"], "algorithm: `loss` has 'sigmo', expected names among sigmoid"),
        (["algorithm.loss={ipo: 0.5, hinge: -1}"], "expected numbers above 0"),
        (["algorithm.loss=nca", "algorithm.label_smoothing=0.1"], "algorithm.label_smoothing: has no effect here"),
        (["algorithm.loss=nca", "algorithm.divergence=forward_kl"], "algorithm: `divergence` works only with loss"),
        (["algorithm.divergence_alpha=0.3"], "algorithm.divergence_alpha: has no effect here"),
        (["reference.model=a/b"], "reference: has no effect here: the reference of algorithm dpo is the policy before"),
        (["algorithm={name: simpo}", "reference.model=a/b"], "reference: has no effect here: algorithm simpo has no"),
        (["algorithm={name: cpo, loss: ipo, label_smoothing: 0.1}"], "algorithm.label_smoothing: has no effect here"),
        (["data.max_sequence_tokens=4097"], "data.max_sequence_tokens: is 4097 and must be at most 4096"),
        (["data.eval=null", "train.early_stopping.patience=2"], "train.early_stopping: has no effect here"),
        (["eval.every=2", "train.early_stopping.patience=5"], "the run has 5 evaluations, too few to wait for 5"),
        (["algorithm.neftune_alpha=5"], "algorithm.neftune_alpha: is a key of `sft`; `dpo` has beta, "),
        (["train.best_metric=eval/heldout/score"], "a leading `-`: eval/heldout/loss, eval/heldout/accuracy"),
        (["algorithm.loss={sigmoid: 1e999}"], "is not a finite number"),
        (["algorithm={name: dpo, length_alpha: 0.5, sft_coef: 1}"], "algorithm: `length_alpha` below 1 contradicts"),
        (["rollouts.top_p=0.9"], "rollouts: has no effect here: algorithm dpo samples no responses"),
        (["algorithm={name: dpo, loss: {sigmoid: 1, aot: 1}, wpo: true}"], "`wpo` weights single pairs, but `loss"),
        (["algorithm={name: orpo, wpo: true}"], "algorithm.wpo: is a key of "),
        (["algorithm={name: tpo, sft_coef: 0}"], "algorithm.sft_coef: got 0, expected a number > 0"),
        (["algorithm={name: tpo}", "data.max_sequence_tokens=2731"], "data.max_sequence_tokens: is 2731 and must be"),
    ],
)
def test_what_preferences_refuse(overrides: list[str], message: str) -> None:
    assert message in refusal(PREFERENCES, overrides)


@pytest.mark.parametrize(
    "override",
    [
        "algorithm.loss={sigmoid: 0.8, bco: 0.2}",
        "algorithm={name: kto, loss: apo_zero}",
        "algorithm={name: orpo}",
        "algorithm={name: tpo, length_normalize: true, beta: 2, gamma: 0.5, wpo: true}",
        "algorithm={name: simpo, wpo: true}",
        "algorithm={name: reward_model, centering: 0.01}",
        "algorithm={name: dpo, divergence: alpha, divergence_alpha: 0.3}",
    ],
)
def test_preference_configs_pass(override: str) -> None:
    changed(PREFERENCES, [override])


DISTILLATION = """\
run: {name: demo}
policy: {model: some/model}
teacher: {model: large/model}
algorithm: {name: distillation}
data: {train: examples.jsonl, eval: heldout.jsonl}
train: {steps: 10, lr: 1.0e-6, sequences_per_update: 16}
"""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher=null"], "teacher: is missing: algorithm distillation learns from a model; name it as teacher.model"),
        (["algorithm={name: sft}"], "teacher: has no effect here: algorithm sft has no teacher; remove it, or use"),
        (["algorithm={name: sft}", "teacher=null", "cluster.roles.teacher.workers=2"], "has no effect here: this run"),
        (["algorithm.beta=0.3"], "algorithm.beta: has no effect here: algorithm.divergence is forward_kl; remove it"),
        (["algorithm={name: distillation, divergence: jsd, beta: 1}"], "algorithm.beta: got 1, expected a number > 0"),
        (["algorithm.temperature=0"], "algorithm.temperature: got 0, expected a number > 0"),
        (["teacher.model=stage:sft"], "teacher.model: got 'stage:sft', but this run is not a pipeline's stage"),
        (["cluster.roles.teacher.workers=2"], "cluster.roles.teacher.workers: is 2, but it is colocated with policy"),
        (["cluster.roles.teacher.cpus=2"], "cluster.roles.teacher.cpus: has no effect here"),
        ([CUDA, "cluster.roles.teacher.threads=2"], "cluster.roles.teacher.threads: has no effect here"),
        (["reference.model=a/b"], "reference: has no effect here: algorithm distillation has no reference"),
        (["train.best_metric=eval/heldout/accuracy"], "a leading `-`: eval/heldout/loss, eval/heldout/token_accuracy"),
    ],
)
def test_what_distillation_refuses(overrides: list[str], message: str) -> None:
    assert message in refusal(DISTILLATION, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm={name: distillation, divergence: jsd, beta: 0.3, temperature: 2, sft_coef: 0.1}"],
        ["cluster.roles.teacher={workers: 3, cpus: 2, colocate_with: null}"],
        ["policy.lora={}", "cluster.roles.policy.workers=2", "cluster.roles.teacher.workers=2", CUDA],
        ["train.best_metric=-eval/heldout/nll"],
    ],
)
def test_distillation_configs_pass(overrides: list[str]) -> None:
    changed(DISTILLATION, overrides)

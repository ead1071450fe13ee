"""Workers train on pairs and on labelled responses, without Ray, in agreement with plain torch, and over layouts.

The law: a step does not depend on ranks or micro-batches, not even for a loss that couples the pairs of a step. A
process for each rank is started for each layout and serves all tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.algorithms.dpo import DPO, DPOConfig
from rlhf.models.files.tiny import build_tiny_llama
from rlhf.objectives.preference_loss import aot_unpaired, bco_pair, dpo
from rlhf.objectives.unpaired_loss import bco, kto
from rlhf.types import Examples, Pairs
from tests.integration.gang_workers import PlainTraining, assert_equal, merged
from tests.integration.offline_training import LR, ROWS, STEPS, data_of, steps_of, train_rank
from tests.integration.rank_gang import Gangs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", seed=3))


Train = Callable[..., list[dict[str, float]]]


@pytest.fixture(scope="module")
def train(gangs: Gangs, model: str, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Return metrics of each step, then of an evaluation as a whole and in parts. A single rank has all rows in a
    micro-batch; each of 2 ranks has about one row."""
    folder = str(tmp_path_factory.mktemp("runs"))

    def run(algorithm: dict[str, Any], *, ranks: int, repeated: tuple[int, ...] = ()) -> list[dict[str, float]]:
        settings = {"algorithm": algorithm, "model": model, "folder": folder, "repeated": repeated}
        return merged(gangs[ranks].run(train_rank, tokens=4096 if ranks == 1 else 64, **settings))

    return run


ALGORITHMS = [
    {"name": "dpo"},
    {"name": "dpo", "loss": {"ipo": 0.7, "nca": 0.3}, "length_normalize": True, "sft_coef": 0.2, "beta": 0.5},
    {"name": "dpo", "loss": {"aot": 0.5, "bco": 0.5}, "length_alpha": 0.5},
    {"name": "simpo", "wpo": True},
    {"name": "tpo", "length_normalize": True, "beta": 1.0, "gamma": 0.2, "sft_coef": 0.3, "wpo": True},
    {"name": "reward_model", "centering": 0.01},
    {"name": "process_reward_model"},
    {"name": "kto", "undesirable_weight": 1.5},
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: "-".join([a["name"], str(a.get("loss", ""))[:3]]))
def test_a_step_depends_on_neither_ranks_nor_microbatches(train: Train, algorithm: dict[str, Any]) -> None:
    one, two = (train(algorithm, ranks=ranks) for ranks in (1, 2))
    assert one[0]["update/grad_norm"] > 0
    assert_equal(one, two)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("algorithm", [ALGORITHMS[1], *ALGORITHMS[3:7]], ids=lambda a: a["name"])
def test_an_evaluation_in_pieces_is_that_of_the_whole(train: Train, algorithm: dict[str, Any]) -> None:
    """The exception is losses that couple rows: coupling stays within a part."""
    *_, whole, pieces = train(algorithm, ranks=2)
    assert whole.keys() == pieces.keys()
    assert all(whole[key] == pytest.approx(pieces[key], rel=1e-5, abs=1e-6) for key in whole)


def by_sequence(examples: Examples, reduce: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return reduce(tokens, loss mask) of each sequence by itself."""
    sizes = examples.lengths.tolist()
    columns = (examples.token_ids.split(sizes), examples.loss_mask.split(sizes))
    return torch.stack([reduce(ids, mask) for ids, mask in zip(*columns, strict=True)])


def logprobs_of(model: Any, examples: Examples) -> Tensor:
    """Plain torch: whole logits, summed over the loss mask."""

    def summed(ids: Tensor, mask: Tensor) -> Tensor:
        logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        return logprobs[mask[1:]].sum()

    return by_sequence(examples, summed)


def on_policy_weights(model: Any, examples: Examples) -> Tensor:
    """Plain torch: exp of the mean over a response of log p(token) - log sum p^2."""

    def weight(ids: Tensor, mask: Tensor) -> Tensor:
        p = model(ids[None]).logits[0, :-1].softmax(-1)
        return (p.gather(-1, ids[1:, None])[:, 0] / p.square().sum(-1))[mask[1:]].log().mean().exp()

    return by_sequence(examples, weight).detach()


def assert_trains_as(
    ours: list[dict[str, float]],
    model: Any,
    loss_of: Callable[[list[int]], tuple[Tensor, dict[str, float]]],
    *again: int,
) -> None:
    """Train a model in plain torch by the loss of each step's rows. Compare loss, gradient and further metrics."""
    training = PlainTraining(model, lr=LR)
    for step in range(STEPS):
        loss, metrics = loss_of([*range(step * ROWS // STEPS, (step + 1) * ROWS // STEPS), *again])
        metrics["update/grad_norm"] = training.step(loss)
        assert ours[step]["update/loss/mean"] == pytest.approx(loss.item(), rel=1e-5)
        assert {key: ours[step][key] for key in metrics} == pytest.approx(metrics, rel=1e-3, abs=1e-5)


Ratios = Callable[..., tuple[Tensor, ...]]


def plain_policy(model: str, name: str) -> tuple[Any, Pairs, Ratios]:
    """Return the model, the data, and a function of rows: each side's log-ratios to the model before training."""
    plain, data = AutoModelForCausalLM.from_pretrained(model), data_of(name, model)
    with torch.no_grad():
        reference = logprobs_of(plain, data.examples)

    def ratios(rows: list[int]) -> tuple[Tensor, ...]:
        return (logprobs_of(plain, data.examples) - reference).view(ROWS, -1)[rows].unbind(1)

    return plain, data, ratios


@pytest.mark.timeout(600)
def test_dpo_is_that_of_plain_torch(train: Train, model: str) -> None:
    ours = train({"name": "dpo", "beta": 0.3}, ranks=1)
    plain, _, ratios = plain_policy(model, "dpo")
    assert_trains_as(ours, plain, lambda rows: (dpo(*ratios(rows), beta=0.3).mean(), {}))
    chosen, rejected = ratios(list(range(ROWS)))
    margins = 0.3 * (chosen - rejected)
    assert ours[STEPS]["eval/all/margin"] == pytest.approx(margins.mean().item(), rel=1e-3)
    assert ours[STEPS]["eval/all/accuracy"] == int((margins > 0).sum()) / ROWS


@pytest.mark.timeout(600)
def test_tpo_with_weights_is_that_of_plain_torch(train: Train, model: str) -> None:
    ours = train({"name": "tpo", "beta": 0.1, "gamma": 0.2, "sft_coef": 0.5, "wpo": True}, ranks=1)
    plain, data, _ = plain_policy(model, "tpo")
    counts = by_sequence(data.examples, lambda ids, mask: mask.sum()).view(ROWS, 3)

    def loss_of(rows: list[int]) -> tuple[Tensor, dict[str, float]]:
        chosen, rejected, gold = logprobs_of(plain, data.examples).view(ROWS, 3)[rows].unbind(1)
        weights = on_policy_weights(plain, data.examples).view(ROWS, 3)[rows, :2].prod(1)
        losses = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected) - 0.2)
        loss = (weights * losses).mean() - 0.5 * gold.sum() / counts[rows, 2].sum()
        return loss, {"preference/on_policy_weight/mean": weights.mean().item()}

    assert_trains_as(ours, plain, loss_of)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("loss_name", "ranks"), [("aot_unpaired", 1), ("aot_unpaired", 2), ("bco", 2)])
def test_a_coupled_loss_takes_a_row_as_often_as_the_step_has_it(
    train: Train, model: str, loss_name: str, ranks: int
) -> None:
    again = (0, 7, 7)
    ours = train({"name": "dpo", "loss": loss_name, "beta": 0.3}, ranks=ranks, repeated=again)
    plain, _, ratios = plain_policy(model, "dpo")

    def loss_of(rows: list[int]) -> tuple[Tensor, dict[str, float]]:
        pair = ratios(rows)
        if loss_name == "aot_unpaired":
            return aot_unpaired(*pair, beta=0.3).mean(), {}
        return bco_pair(*pair, beta=0.3, delta=0.3 * torch.cat(pair).mean().item()).mean(), {}

    assert_trains_as(ours, plain, loss_of, *again)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("loss_name", "ranks"), [("kto", 1), ("bco", 2)])
def test_single_responses_are_compared_with_mismatched_ones_or_the_mean_of_the_step(
    train: Train, model: str, loss_name: str, ranks: int
) -> None:
    ours = train({"name": "kto", "loss": loss_name, "beta": 0.3, "undesirable_weight": 2.0}, ranks=ranks)
    plain, data, ratios = plain_policy(model, "kto")

    def loss_of(rows: list[int]) -> tuple[Tensor, dict[str, float]]:
        (given, mismatched), labels = ratios(rows), data.labels[rows]
        kl = max(0.0, mismatched.mean().item())
        rewards = 0.3 * given.detach()
        losses = bco(given, labels, beta=0.3, delta=rewards.mean().item())
        metrics = {"preference/margin/mean": (rewards[labels].mean() - rewards[~labels].mean()).item()}
        if loss_name == "kto":
            losses = kto(given, labels, beta=0.3, kl=kl)
            metrics["preference/mismatched_kl"] = kl
        return (torch.where(labels, 1.0, 2.0) * losses).mean(), metrics

    assert_trains_as(ours, plain, loss_of)
    assert ("preference/mismatched_kl" in ours[0]) == (loss_name == "kto")


def scoring_model(model: str) -> Any:
    """Return a model with a head of zeros, so the first loss is log 2 and only the head moves."""
    plain = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    torch.nn.init.zeros_(plain.score.weight)
    return plain


@pytest.mark.timeout(600)
def test_a_reward_model_scores_as_transformers_has_it(train: Train, model: str) -> None:
    plain, data = scoring_model(model), data_of("reward_model", model)

    def loss_of(rows: list[int]) -> tuple[Tensor, dict[str, float]]:
        scores = by_sequence(data.examples, lambda ids, mask: plain(ids[None]).logits[0, 0]).view(ROWS, 2)[rows]
        margins = scores[:, 0] - scores[:, 1]
        confidence, right = margins.detach().abs().sigmoid(), (margins.detach().sign() + 1) / 2
        assert bool((confidence < 0.55).all())  # one bin of ten
        error = (confidence - right).mean().abs().item()
        return -torch.nn.functional.logsigmoid(margins).mean(), {"preference/calibration_error": error}

    assert_trains_as(train({"name": "reward_model"}, ranks=1), plain, loss_of)


@pytest.mark.timeout(600)
def test_a_process_reward_model_reads_its_head_where_steps_end(train: Train, model: str) -> None:
    plain, data = scoring_model(model), steps_of(model)

    def loss_of(rows: list[int]) -> tuple[Tensor, dict[str, float]]:
        part = data.take(rows)
        hidden = [plain.model(ids[None]).last_hidden_state[0] for ids in part.token_ids.split(part.lengths.tolist())]
        scores, labels = plain.score(torch.cat(hidden))[:, 0], part.step_labels[part.loss_mask].float()
        assert len(labels) == 3 * ROWS // STEPS
        return torch.nn.functional.binary_cross_entropy_with_logits(scores[part.loss_mask], labels), {}

    assert_trains_as(train({"name": "process_reward_model"}, ranks=1), plain, loss_of)


def test_a_dpo_loss_that_couples_is_told_apart() -> None:
    assert DPO(DPOConfig(name="dpo", loss="aot")).couples
    assert not DPO(DPOConfig(name="dpo", loss={"sigmoid": 1.0, "ipo": 0.5})).couples

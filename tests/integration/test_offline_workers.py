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
from rlhf.types import Pairs
from tests.integration.gang_workers import PlainTraining, assert_equal, merged
from tests.integration.offline_training import (
    LR,
    ROWS,
    STEPS,
    data_of,
    steps_of,
    train_rank,
)
from tests.integration.rank_gang import Gangs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(build_tiny_llama(tmp_path_factory.mktemp("model") / "tiny", seed=3))


Train = Callable[..., list[dict[str, float]]]


@pytest.fixture(scope="module")
def train(gangs: Gangs, model: str, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Return metrics of each step, then of an evaluation as a whole and in parts, by 1 rank with all rows in a
    micro-batch or by 2 with about one row."""
    folder = str(tmp_path_factory.mktemp("runs"))

    def run(algorithm: dict[str, Any], *, ranks: int, repeated: tuple[int, ...] = ()) -> list[dict[str, float]]:
        tokens = 4096 if ranks == 1 else 64
        found = gangs[ranks].run(
            train_rank, algorithm=algorithm, model=model, folder=folder, tokens=tokens, repeated=repeated
        )
        return merged(found)

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


def sequence_logprobs(model: Any, pairs: Pairs) -> Tensor:
    """Plain torch: each sequence by itself, whole logits."""
    examples, totals = pairs.examples, []
    for ids, mask in zip(
        examples.token_ids.split(examples.lengths.tolist()),
        examples.loss_mask.split(examples.lengths.tolist()),
        strict=True,
    ):
        logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        totals.append(logprobs[mask[1:]].sum())
    return torch.stack(totals)


@pytest.mark.timeout(600)
def test_dpo_is_that_of_plain_torch(train: Train, model: str) -> None:
    ours = train({"name": "dpo", "beta": 0.3}, ranks=1)
    plain, pairs = AutoModelForCausalLM.from_pretrained(model), data_of("dpo", model)
    training = PlainTraining(plain, lr=LR)
    with torch.no_grad():
        reference = sequence_logprobs(plain, pairs)
    for step in range(STEPS):
        at = slice(step * 2 * ROWS // STEPS, (step + 1) * 2 * ROWS // STEPS)
        ratios = (sequence_logprobs(plain, pairs) - reference)[at]
        loss = dpo(ratios[0::2], ratios[1::2], beta=0.3).mean()
        norm = training.step(loss)
        assert ours[step]["update/loss/mean"] == pytest.approx(loss.item(), rel=1e-5)
        assert ours[step]["update/grad_norm"] == pytest.approx(norm, rel=1e-3)
    ratios = sequence_logprobs(plain, pairs) - reference
    margins = 0.3 * (ratios[0::2] - ratios[1::2])
    assert ours[STEPS]["eval/all/margin"] == pytest.approx(margins.mean().item(), rel=1e-3)
    assert ours[STEPS]["eval/all/accuracy"] == int((margins > 0).sum()) / ROWS


def on_policy_weights(model: Any, pairs: Pairs) -> Tensor:
    """Plain torch: exp of the mean over a response of log p(token) - log sum p^2."""
    examples, weights = pairs.examples, []
    sizes = examples.lengths.tolist()
    for ids, mask in zip(examples.token_ids.split(sizes), examples.loss_mask.split(sizes), strict=True):
        p = model(ids[None]).logits[0, :-1].softmax(-1)
        ratios = p.gather(-1, ids[1:, None])[:, 0] / p.square().sum(-1)
        weights.append(ratios[mask[1:]].log().mean().exp())
    return torch.stack(weights).detach()


@pytest.mark.timeout(600)
def test_tpo_with_weights_is_that_of_plain_torch(train: Train, model: str) -> None:
    ours = train({"name": "tpo", "beta": 0.1, "gamma": 0.2, "sft_coef": 0.5, "wpo": True}, ranks=1)
    plain, rows = AutoModelForCausalLM.from_pretrained(model), data_of("tpo", model)
    training = PlainTraining(plain, lr=LR)
    counts = torch.stack([mask.sum() for mask in rows.examples.loss_mask.split(rows.examples.lengths.tolist())])
    for step in range(STEPS):
        at = slice(step * 3 * ROWS // STEPS, (step + 1) * 3 * ROWS // STEPS)
        chosen, rejected, gold = sequence_logprobs(plain, rows)[at].view(-1, 3).unbind(1)
        weights = on_policy_weights(plain, rows)[at].view(-1, 3)[:, :2].prod(1)
        losses = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected) - 0.2)
        loss = (weights * losses).mean() - 0.5 * gold.sum() / counts[at].view(-1, 3)[:, 2].sum()
        norm = training.step(loss)
        assert ours[step]["update/loss/mean"] == pytest.approx(loss.item(), rel=1e-5)
        assert ours[step]["update/grad_norm"] == pytest.approx(norm, rel=1e-3)
        assert ours[step]["preference/on_policy_weight/mean"] == pytest.approx(weights.mean().item(), rel=1e-4)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("loss_name", "ranks"), [("aot_unpaired", 1), ("aot_unpaired", 2), ("bco", 2)])
def test_a_coupled_loss_takes_a_row_as_often_as_the_step_has_it(
    train: Train, model: str, loss_name: str, ranks: int
) -> None:
    ours = train({"name": "dpo", "loss": loss_name, "beta": 0.3}, ranks=ranks, repeated=(0, 7, 7))
    plain, pairs = AutoModelForCausalLM.from_pretrained(model), data_of("dpo", model)
    training = PlainTraining(plain, lr=LR)
    with torch.no_grad():
        reference = sequence_logprobs(plain, pairs)
    for step in range(STEPS):
        rows = [*range(step * ROWS // STEPS, (step + 1) * ROWS // STEPS), 0, 7, 7]
        ratios = sequence_logprobs(plain, pairs) - reference
        chosen, rejected = (ratios[[2 * row + side for row in rows]] for side in (0, 1))
        delta = 0.3 * torch.cat([chosen, rejected]).mean().item()
        losses = {
            "aot_unpaired": aot_unpaired(chosen, rejected, beta=0.3),
            "bco": bco_pair(chosen, rejected, beta=0.3, delta=delta),
        }
        loss = losses[loss_name].mean()
        training.step(loss)
        assert ours[step]["update/loss/mean"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.timeout(600)
def test_bco_compares_with_the_mean_of_the_step(train: Train, model: str) -> None:
    ours = train({"name": "kto", "loss": "bco", "beta": 0.3}, ranks=2)
    plain, rows = AutoModelForCausalLM.from_pretrained(model), data_of("kto", model)
    training = PlainTraining(plain, lr=LR)
    with torch.no_grad():
        reference = sequence_logprobs(plain, rows)
    for step in range(STEPS):
        at = slice(step * ROWS // STEPS, (step + 1) * ROWS // STEPS)
        ratios = (sequence_logprobs(plain, rows) - reference)[0::2][at]
        labels = rows.labels[at]
        delta = 0.3 * ratios.mean().item()
        loss = bco(ratios, labels, beta=0.3, delta=delta).mean()
        training.step(loss)
        assert ours[step]["update/loss/mean"] == pytest.approx(loss.item(), rel=1e-5)
        rewards = 0.3 * ratios.detach()
        margin = (rewards[labels].mean() - rewards[~labels].mean()).item()
        assert ours[step]["preference/margin/mean"] == pytest.approx(margin, abs=1e-5)
        assert "preference/mismatched_kl" not in ours[step]


@pytest.mark.timeout(600)
def test_kto_compares_with_mismatched_responses(train: Train, model: str) -> None:
    ours = train({"name": "kto", "beta": 0.3, "undesirable_weight": 2.0}, ranks=1)
    plain, rows = AutoModelForCausalLM.from_pretrained(model), data_of("kto", model)
    training = PlainTraining(plain, lr=LR)
    with torch.no_grad():
        reference = sequence_logprobs(plain, rows)
    for step in range(STEPS):
        at = slice(step * 2 * ROWS // STEPS, (step + 1) * 2 * ROWS // STEPS)
        ratios = (sequence_logprobs(plain, rows) - reference)[at]
        labels = rows.labels[step * ROWS // STEPS : (step + 1) * ROWS // STEPS]
        kl = max(0.0, ratios[1::2].mean().item())
        weights = torch.where(labels, 1.0, 2.0)
        loss = (weights * kto(ratios[0::2], labels, beta=0.3, kl=kl)).mean()
        training.step(loss)
        assert ours[step]["update/loss/mean"] == pytest.approx(loss.item(), rel=1e-5)
        assert ours[step]["preference/mismatched_kl"] == pytest.approx(kl, abs=1e-5)


@pytest.mark.timeout(600)
def test_a_reward_model_scores_as_transformers_has_it(train: Train, model: str) -> None:
    """The head begins at zero, so the first loss is log 2 and only the head moves; the second loss is plain torch's."""
    ours = train({"name": "reward_model"}, ranks=1)
    pairs = data_of("reward_model", model)
    plain = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    torch.nn.init.zeros_(plain.score.weight)
    training = PlainTraining(plain, lr=LR)
    for step in range(STEPS):
        scores = torch.stack(
            [plain(ids[None]).logits[0, 0] for ids in pairs.examples.token_ids.split(pairs.examples.lengths.tolist())]
        )
        at = slice(step * 2 * ROWS // STEPS, (step + 1) * 2 * ROWS // STEPS)
        margins = scores[at][0::2] - scores[at][1::2]
        loss = -torch.nn.functional.logsigmoid(margins).mean()
        confidence, right = margins.detach().abs().sigmoid(), (margins.detach().sign() + 1) / 2
        assert bool((confidence < 0.55).all())  # one bin of ten
        error = (confidence - right).mean().abs().item()
        assert ours[step]["preference/calibration_error"] == pytest.approx(error, abs=1e-5)
        training.step(loss)
        assert ours[step]["update/loss/mean"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.timeout(600)
def test_a_process_reward_model_reads_its_head_where_steps_end(train: Train, model: str) -> None:
    ours = train({"name": "process_reward_model"}, ranks=1)
    data = steps_of(model)
    plain = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    torch.nn.init.zeros_(plain.score.weight)
    training = PlainTraining(plain, lr=LR)
    for step in range(STEPS):
        part = data.take(range(step * ROWS // STEPS, (step + 1) * ROWS // STEPS))
        hidden = [plain.model(ids[None]).last_hidden_state[0] for ids in part.token_ids.split(part.lengths.tolist())]
        scores = plain.score(torch.cat(hidden))[:, 0][part.loss_mask]
        labels = part.step_labels[part.loss_mask].float()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(scores, labels)
        training.step(loss)
        assert len(scores) == 3 * ROWS // STEPS
        assert ours[step]["update/loss/mean"] == pytest.approx(loss.item(), rel=1e-5)


def test_a_dpo_loss_that_couples_is_told_apart() -> None:
    assert DPO(DPOConfig(name="dpo", loss="aot")).couples
    assert not DPO(DPOConfig(name="dpo", loss={"sigmoid": 1.0, "ipo": 0.5})).couples

"""Divergences of next-token distributions: by hand over two tokens, and in chunks against whole logits."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.objectives.distillation import (
    Divergence,
    TeacherStates,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    sampled_divergence_sum,
    teacher_advantages,
    weighted_divergence_sum,
)

STUDENT, TEACHER = (torch.tensor(p, dtype=torch.float64).log() for p in ([0.5, 0.5], [0.75, 0.25]))
DIVERGENCES: list[Divergence] = [forward_kl, reverse_kl, partial(generalized_jsd, beta=0.3)]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_both_kls() -> None:
    torch.testing.assert_close(forward_kl(STUDENT, TEACHER).item(), kl([0.75, 0.25], [0.5, 0.5]))
    torch.testing.assert_close(reverse_kl(STUDENT, TEACHER).item(), kl([0.5, 0.5], [0.75, 0.25]))


def test_generalized_jsd() -> None:
    mixture = [0.2 * 0.75 + 0.8 * 0.5, 0.2 * 0.25 + 0.8 * 0.5]
    expected = 0.2 * kl([0.75, 0.25], mixture) + 0.8 * kl([0.5, 0.5], mixture)
    torch.testing.assert_close(generalized_jsd(STUDENT, TEACHER, beta=0.2).item(), expected)


@pytest.mark.parametrize("beta", [0.0, 1.0, math.nan])
def test_a_mixture_of_one_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match="0 < beta < 1"):
        generalized_jsd(STUDENT, TEACHER, beta=beta)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_tokens_that_neither_can_say_add_nothing(divergence: Divergence) -> None:
    logits = torch.tensor([1.0, 2.0, -math.inf], requires_grad=True)
    teacher = torch.tensor([2.0, 1.0, -math.inf]).log_softmax(-1)
    found = divergence(logits.log_softmax(-1), teacher)
    torch.testing.assert_close(found, divergence(logits[:2].log_softmax(-1), teacher[:2]))
    assert torch.autograd.grad(found, logits)[0].isfinite().all()


def test_the_jsd_of_what_never_meets_is_the_entropy_of_beta() -> None:
    apart = torch.tensor([0.0, -math.inf]), torch.tensor([-math.inf, 0.0])
    torch.testing.assert_close(generalized_jsd(*apart, beta=0.25).item(), kl([0.25, 0.75], [1.0, 1.0]) * -1.0)
    assert forward_kl(*apart) == math.inf


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_chunks_give_what_whole_logits_give(divergence: Divergence, chunk_size: int) -> None:
    hidden, weight, bias = (random(*shape, seed=i).requires_grad_() for i, shape in enumerate([(10, 4), (7, 4), (7,)]))
    teacher = TeacherStates(hidden=random(10, 3, seed=3), weight=random(7, 3, seed=4), softcap=3.0, logit_scale=0.5)
    settings: dict[str, Any] = {"temperature": 0.7, "softcap": 2.0, "logit_scale": 1.5}
    settings |= {"bias": bias, "chunk_size": chunk_size, "token_weight": 0.5}
    loss, found, *_ = weighted_divergence_sum(divergence, hidden, weight, torch.zeros(10).long(), teacher, **settings)
    logits = 2.0 * (1.5 * (hidden @ weight.T + bias) / 2.0).tanh() / 0.7
    teacher_logits = 3.0 * (0.5 * (teacher.hidden @ teacher.weight.T) / 3.0).tanh() / 0.7
    whole = divergence(logits.log_softmax(-1), teacher_logits.log_softmax(-1))
    torch.testing.assert_close(found, whole.detach())
    for ours, theirs in zip(
        torch.autograd.grad(loss, [hidden, weight, bias]),
        torch.autograd.grad(0.5 * whole.sum(), [hidden, weight, bias]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("sft_coef", [0.0, 0.3])
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_a_weighted_sum_is_that_of_whole_logits(temperature: float, sft_coef: float, chunk_size: int) -> None:
    inputs = hidden, weight, bias = [
        random(*shape, seed=i).requires_grad_() for i, shape in enumerate([(10, 4), (7, 4), (7,)])
    ]
    teacher = TeacherStates(hidden=random(10, 3, seed=3), weight=random(7, 3, seed=4))
    targets = torch.arange(10) % 7
    settings: dict[str, Any] = {"temperature": temperature, "softcap": 2.0, "chunk_size": chunk_size}
    loss, found, logprobs, is_top1 = weighted_divergence_sum(
        forward_kl, hidden, weight, targets, teacher, bias=bias, token_weight=0.2, sft_coef=sft_coef, **settings
    )
    logits = 2.0 * ((hidden @ weight.T + bias) / 2.0).tanh()
    divergences = forward_kl(
        (logits / temperature).log_softmax(-1), (teacher.hidden @ teacher.weight.T / temperature).log_softmax(-1)
    )
    whole = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    expected = 0.2 * (divergences.sum() - sft_coef * whole.sum())
    torch.testing.assert_close([loss, found, logprobs], [expected, divergences.detach(), whole.detach()])
    assert is_top1.tolist() == (logits.argmax(-1) == targets).tolist()
    assert 0 < int(is_top1.sum()) < 10
    torch.testing.assert_close(
        torch.autograd.grad(2.0 * loss, inputs), torch.autograd.grad(2.0 * expected, inputs), rtol=1e-6, atol=1e-8
    )
    assert not any(column.requires_grad for column in (found, logprobs, is_top1))
    with torch.no_grad():
        again, *_ = weighted_divergence_sum(
            forward_kl, hidden, weight, targets, teacher, bias=bias, token_weight=0.2, sft_coef=sft_coef, **settings
        )
    assert again == loss


def test_bfloat16_is_reduced_in_float32() -> None:
    hidden, weight = (random(*shape, seed=i).bfloat16().requires_grad_() for i, shape in enumerate([(5, 4), (7, 4)]))
    teacher = TeacherStates(hidden=random(5, 4, seed=2).bfloat16(), weight=random(7, 4, seed=3).bfloat16())
    loss, found, *_ = weighted_divergence_sum(
        forward_kl, hidden, weight, torch.zeros(5).long(), teacher, token_weight=1.0, chunk_size=2
    )
    gradients = torch.autograd.grad(loss, [hidden, weight])
    assert found.dtype == torch.float32
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16] * 2
    logprobs = (
        (h.double() @ w.double().T).log_softmax(-1) for h, w in ((hidden, weight), (teacher.hidden, teacher.weight))
    )
    torch.testing.assert_close(found.double(), forward_kl(*logprobs), rtol=0.02, atol=0.02)


def test_other_rows_or_vocabularies_are_refused() -> None:
    teacher = TeacherStates(hidden=random(5, 3, seed=0), weight=random(7, 3, seed=1))
    for hidden, weight in ((random(4, 4, seed=2), random(7, 4, seed=3)), (random(5, 4, seed=2), random(8, 4, seed=3))):
        with pytest.raises(ValueError, match="one teacher row a student row and one vocabulary"):
            weighted_divergence_sum(
                forward_kl, hidden, weight, torch.zeros(len(hidden)).long(), teacher, token_weight=1.0
            )


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_of_sampled_tokens_the_sum_is_that_of_given_ones(divergence: Divergence, chunk_size: int) -> None:
    inputs = hidden, weight, bias = [
        random(*shape, seed=i).requires_grad_() for i, shape in enumerate([(10, 4), (7, 4), (7,)])
    ]
    teacher = TeacherStates(hidden=random(10, 3, seed=3), weight=random(7, 3, seed=4))
    sampled = torch.arange(10) % 7
    settings: dict[str, Any] = {"bias": bias, "temperature": 0.7, "token_weight": 0.2, "chunk_size": chunk_size}
    loss, *columns = sampled_divergence_sum(divergence, hidden, weight, sampled, teacher, **settings)
    given, *_ = weighted_divergence_sum(divergence, hidden, weight, sampled, teacher, **settings)
    torch.testing.assert_close(loss, given)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(given, inputs))
    log_p = ((hidden @ weight.T + bias) / 0.7).log_softmax(-1).detach()
    log_q = (teacher.hidden @ teacher.weight.T / 0.7).log_softmax(-1)
    expected = [of.gather(-1, sampled[:, None])[:, 0] for of in (log_p, log_q)] + [-(log_p.exp() * log_p).sum(-1)]
    torch.testing.assert_close(columns, expected)
    assert not any(column.requires_grad for column in columns)


def test_the_policy_gradient_of_the_teacher_s_advantages_is_that_of_the_reverse_kl() -> None:
    logits = torch.tensor([0.3, -0.4, 1.1], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    logprobs = logits.log_softmax(-1)  # of each token that could be sampled
    advantages = teacher_advantages(logprobs, teacher, torch.tensor([True, True, True]))
    assert not advantages.requires_grad
    expected_loss = -(logprobs.detach().exp() * advantages * logprobs).sum()
    (found,) = torch.autograd.grad(expected_loss, logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(reverse_kl(logprobs, teacher), logits)
    torch.testing.assert_close(found, wanted)


def test_advantages_are_of_the_sampled_tokens_alone() -> None:
    mask = torch.tensor([False, True, True])
    found = teacher_advantages(torch.tensor([0.0, -2.0, -0.5]), torch.tensor([-9.0, -1.0, -3.0]), mask)
    assert found.tolist() == [0.0, 1.0, -2.5]  # -1 - -2 and -3 - -0.5

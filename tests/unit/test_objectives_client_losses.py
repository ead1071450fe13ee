"""Each loss of a client, against a plain loop over rows, targets and tokens in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.errors import UserError
from rlhf.objectives.client_losses import LOSSES, checked_settings, client_loss

LENGTHS = [4, 1, 6]
Loop = Callable[[list[Tensor], Mapping[str, list[Tensor]], Mapping[str, float]], Tensor]


def cross_entropy(lp: list[Tensor], x: Mapping[str, list[Tensor]], _: Mapping[str, float]) -> Tensor:
    return sum((-lp[r] * x["weights"][r]).sum() for r in range(len(lp)))  # type: ignore[return-value]


def each(term: Callable[[Any, Any, Any, Any, Mapping[str, float], int], Any]) -> Loop:
    """Return a loop over all tokens of a function of (logprob, old, advantage, row's columns, settings, place)."""

    def loop(lp: list[Tensor], x: Mapping[str, list[Tensor]], c: Mapping[str, float]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for row, logprobs in enumerate(lp):
            own = {name: column[row].flatten() for name, column in x.items()}
            own["all"] = logprobs.flatten()
            for t in range(logprobs.numel()):
                one = term(own["all"][t], own["logprobs"][t], own["advantages"][t], own, c, t)
                total = total + (own["weights"][t] * one if "weights" in own else one)
        return total

    return loop


def bound(own: Any, c: Mapping[str, float], name: str, t: int) -> Any:
    return own[name][t] if name in own else torch.tensor(c[name], dtype=torch.float64)


def clipped(ratio: Any, a: Any, own: Any, c: Mapping[str, float], t: int) -> Any:
    low, high = (bound(own, c, f"clip_{side}_threshold", t) for side in ("low", "high"))
    return -torch.minimum(ratio * a, torch.minimum(torch.maximum(ratio, low), high) * a)


def cispo(lp: Any, old: Any, a: Any, own: Any, c: Mapping[str, float], t: int) -> Any:
    low, high = (bound(own, c, f"clip_{side}_threshold", t) for side in ("low", "high"))
    return -torch.minimum(torch.maximum((lp - old).exp(), low), high).detach() * lp * a


def gspo(lp: Any, old: Any, a: Any, own: Any, c: Mapping[str, float], t: int) -> Any:
    chosen = own["sequence_ratio_mask"] != 0
    mean = (own["all"].detach() - own["logprobs"])[chosen].mean()
    return clipped((mean + lp - lp.detach()).exp(), a, own, c, t)


LOOPS: Mapping[str, Loop] = {
    "cross_entropy": cross_entropy,
    "importance_sampling": each(lambda lp, old, a, own, c, t: -(lp - old).exp() * a),
    "ppo": each(lambda lp, old, a, own, c, t: clipped((lp - old).exp(), a, own, c, t)),
    "cispo": each(cispo),
    "dro": each(lambda lp, old, a, own, c, t: -(lp * a - 0.5 * c["beta"] * (lp - old) ** 2)),
    "gspo": each(gspo),
}


def drawn(name: str, *, targets: int, bounds: bool, weights: bool) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(len(name) + targets)
    shape = (sum(LENGTHS), targets)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)

    logprobs = uniform(-3.0, -0.1)
    columns: dict[str, Tensor] = {}
    if LOSSES[name].columns:
        columns = {"logprobs": logprobs + uniform(-0.6, 0.6), "advantages": uniform(-1.0, 1.0)}
        columns["advantages"][::4] = 0.0
    if name == "gspo":
        columns["sequence_ratio_mask"] = (uniform(0.0, 1.0) < 0.7).double()
        columns["sequence_ratio_mask"][[0, 4, 5]] = 1.0  # at least one in each row
    if bounds:
        columns |= {"clip_low_threshold": uniform(0.6, 0.9), "clip_high_threshold": uniform(1.1, 1.6)}
    if weights or name == "cross_entropy":
        columns["weights"] = uniform(0.0, 2.0)
        columns["weights"][1::5] = 0.0
    return logprobs, columns


def cases() -> list[tuple[str, int, bool, bool, dict[str, float | str]]]:
    found: list[tuple[str, int, bool, bool, dict[str, float | str]]] = []
    for name, loss in LOSSES.items():
        found += [(name, 1, False, False, {}), (name, 1, False, True, {})]
        if name != "gspo":
            found.append((name, 3, False, False, {}))
        if "clip_low_threshold" in loss.settings:
            found += [(name, 1, True, True, {}), (name, 1, False, False, {"clip_high_threshold": 1.5})]
    return [*found, ("dro", 1, False, False, {"beta": 0.4})]


@pytest.mark.parametrize(("name", "targets", "bounds", "weights", "given"), cases())
def test_losses_and_gradients_equal_a_plain_loop(
    name: str, targets: int, bounds: bool, weights: bool, given: dict[str, float | str]
) -> None:
    logprobs, columns = drawn(name, targets=targets, bounds=bounds, weights=weights)
    settings = checked_settings(name, given)
    packed, plain = (logprobs.clone().requires_grad_() for _ in range(2))
    mask, lengths = torch.ones(len(logprobs), dtype=torch.bool), torch.tensor(LENGTHS)
    terms = client_loss(name, packed, columns, mask=mask, lengths=lengths, settings=settings).terms
    rows = {key: list(column.split(LENGTHS)) for key, column in columns.items()}
    expected = LOOPS[name](list(plain.split(LENGTHS)), rows, settings)
    torch.testing.assert_close(terms.sum(), expected, rtol=1e-12, atol=1e-12)
    terms.sum().backward()
    expected.backward()
    torch.testing.assert_close(packed.grad, plain.grad, rtol=1e-12, atol=1e-12)
    assert float(expected.detach()) != 0.0


def test_a_place_that_is_not_scored_has_no_loss_and_no_gradient() -> None:
    for name in LOSSES:
        logprobs, columns = drawn(name, targets=1, bounds=False, weights=True)
        logprobs.requires_grad_()
        mask = torch.ones(len(logprobs), dtype=torch.bool)
        mask[3] = False
        settings = checked_settings(name, {})
        found = client_loss(name, logprobs, columns, mask=mask, lengths=torch.tensor(LENGTHS), settings=settings)
        found.terms.sum().backward()
        assert found.terms[3] == 0.0
        assert logprobs.grad is not None
        assert logprobs.grad[3] == 0.0


def test_a_ratio_that_overflows_has_no_effect_at_an_advantage_of_zero() -> None:
    logprobs = torch.tensor([[-1.0], [-1.0]], requires_grad=True)
    columns = {"logprobs": torch.tensor([[-1e4], [-1.0]]), "advantages": torch.tensor([[0.0], [1.0]])}
    options: dict[str, Any] = {"mask": torch.ones(2, dtype=torch.bool), "lengths": torch.tensor([2])}
    terms = client_loss("importance_sampling", logprobs, columns, settings={}, **options).terms
    terms.sum().backward()
    assert terms[:, 0].tolist() == [0.0, -1.0]
    assert logprobs.grad is not None
    assert logprobs.grad[:, 0].tolist() == [0.0, -1.0]


def test_clipped_terms_are_those_without_a_gradient() -> None:
    logprobs = torch.tensor([[-1.0], [-1.0], [-1.0], [-1.0]], requires_grad=True)
    columns = {
        "logprobs": logprobs.detach() + torch.tensor([[0.5], [0.5], [-0.5], [-0.5]]),  # ratios 0.61 and 1.65
        "advantages": torch.tensor([[1.0], [-1.0], [1.0], [-1.0]]),
    }
    options: dict[str, Any] = {"mask": torch.ones(4, dtype=torch.bool), "lengths": torch.tensor([4])}
    found = client_loss("ppo", logprobs, columns, settings=checked_settings("ppo", {}), **options)
    found.terms.sum().backward()
    assert found.clipped is not None
    assert found.clipped[:, 0].tolist() == [False, True, True, False]
    assert logprobs.grad is not None
    assert (logprobs.grad[:, 0] == 0).tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("stable_reinforce", {}, r"no 'stable_reinforce' here: it needs what the sampler recorded.*cross_entropy, imp"),
        ("nonsense", {}, "no 'nonsense' here. The losses are cross_entropy"),
        ("ppo", {"beta": 1.0}, "ppo has no setting 'beta'; it has the settings clip_low_threshold"),
        ("cross_entropy", {"beta": 1.0}, "it has no settings"),
        ("dro", {"beta": math.nan}, "beta is nan, expected a finite number >= 0"),
        ("dro", {"beta": "high"}, "beta is 'high', expected"),
        ("cispo", {"clip_low_threshold": 5.0}, "clip_low_threshold is 5, above clip_high_threshold = 4"),
    ],
)
def test_unknown_losses_and_settings_are_refused(name: str, given: dict[str, float | str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        checked_settings(name, given)

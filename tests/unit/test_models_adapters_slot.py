"""Adapters of smaller ranks and fewer layers in the slot of the largest rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from rlhf.adapters import AdapterShape
from rlhf.errors import UserError
from rlhf.models.adapters.lora import add_lora
from rlhf.models.adapters.slot import AdapterSlot
from tests.integration.rank_gang import small_config


@pytest.fixture(scope="module")
def slot() -> AdapterSlot:
    model: Any = add_lora(LlamaForCausalLM(small_config()), rank=4, alpha=4.0, dropout=0.0)
    return AdapterSlot(model)


def test_an_adapter_has_the_layers_of_its_shape(slot: AdapterSlot) -> None:
    both = {name.rpartition(".")[2] for name in slot.layers(AdapterShape(rank=2))}
    attention = {name.rpartition(".")[2] for name in slot.layers(AdapterShape(rank=2, mlp=False))}
    assert attention == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert both - attention == {"gate_proj", "up_proj", "down_proj"}
    assert slot.config(AdapterShape(rank=2, attention=False)).target_modules == both - attention


def test_initial_values_depend_on_shape_and_seed_alone(slot: AdapterSlot) -> None:
    shape = AdapterShape(rank=3, mlp=False, seed=5)
    one, two = slot.trimmed(shape, slot.initial(shape)), slot.trimmed(shape, slot.initial(shape))
    larger = AdapterSlot(add_lora(LlamaForCausalLM(small_config()), rank=6, alpha=1.0, dropout=0.0))
    three = larger.trimmed(shape, larger.initial(shape))
    for name, weight in one.items():
        assert torch.equal(weight, two[name])
        assert torch.equal(weight, three[name])
        assert bool(weight.any()) == (".lora_A." in name)
    other = slot.trimmed(shape, slot.initial(AdapterShape(rank=3, mlp=False, seed=6)))
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_the_rest_of_the_slot_is_zero(slot: AdapterSlot) -> None:
    shape = AdapterShape(rank=3, mlp=False)
    values = slot.initial(shape)
    assert len(values) == 2 * 7 * 2
    assert all(not bool(value.any()) for name, value in values.items() if ".mlp." in name)
    assert all(not bool(value[3:].any()) for name, value in values.items() if ".lora_A." in name)
    again = slot.padded(shape, slot.trimmed(shape, values))
    assert all(torch.equal(value, again[name]) for name, value in values.items())


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (AdapterShape(rank=5), "rank: is 5, expected 1 to 4"),
        (AdapterShape(rank=0), "rank: is 0"),
        (AdapterShape(rank=2, attention=False, mlp=False), "would adapt no layer of this model"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(slot: AdapterSlot, shape: AdapterShape, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        slot.initial(shape)

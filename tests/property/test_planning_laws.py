"""Laws of the planned memory for every model and layout."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from rlhf.planning.memory import Training, training_terms
from rlhf.planning.shapes import Shape

SHAPES = st.builds(
    lambda heads, groups, head_size, ffn, layers, vocab: Shape(
        source="drawn",
        hidden=heads * groups * head_size,
        ffn=ffn,
        layers=layers,
        heads=heads * groups,
        kv_heads=heads,
        head_size=head_size,
        vocab=vocab,
        tied=False,
    ),
    heads=st.integers(1, 16),
    groups=st.integers(1, 8),
    head_size=st.sampled_from([32, 64, 128]),
    ffn=st.integers(64, 30_000),
    layers=st.integers(1, 100),
    vocab=st.integers(100, 200_000),
)


@st.composite
def trainings(draw: st.DrawFn) -> tuple[Shape, Training]:
    shape, lora = draw(SHAPES), draw(st.sampled_from([None, 8, 64]))
    whole, size = shape.parameters, draw(st.sampled_from([2, 4]))
    return shape, Training(
        trained=whole if lora is None else shape.lora_parameters(lora),
        frozen=0 if lora is None else whole,
        frozen_bytes=0.0 if lora is None else whole * size,
        itemsize=size,
        zero_stage=draw(st.sampled_from([0, 1, 2, 3])),
        ranks=draw(st.integers(1, 64)),
        tokens=draw(st.integers(1, 100_000)),
        accumulates=draw(st.booleans()),
        checkpointing=draw(st.booleans()),
        lora_rank=lora,
        scalar=draw(st.booleans()),
        keeps_head_gradient=draw(st.booleans()),
        optimizer="adamw",
        offload=(),
        on_gpu=draw(st.booleans()),
        widens=draw(st.booleans()),
    )


def total(shape: Shape, training: Training) -> float:
    return sum(term.nbytes for term in training_terms(shape, training))


@given(trainings())
def test_memory_grows_with_the_work_and_shrinks_with_the_ranks(drawn: tuple[Shape, Training]) -> None:
    shape, one = drawn
    assert total(shape, replace(one, tokens=2 * one.tokens)) >= total(shape, one)
    several = replace(one, ranks=one.ranks + (one.zero_stage == 3))  # one rank alone gathers no weights
    assert total(shape, replace(several, ranks=2 * several.ranks)) <= total(shape, several)
    assert total(shape, replace(one, accumulates=True)) >= total(shape, replace(one, accumulates=False))
    more_layers = replace(shape, layers=2 * shape.layers)
    assert total(more_layers, one) >= total(shape, one)
    least = one.trained * (one.itemsize + 8) / one.ranks + one.frozen * one.itemsize / one.ranks
    assert total(shape, one) >= least  # weights and moments, were all of it shared out


@given(trainings())
def test_what_is_offloaded_moves_and_is_not_lost(drawn: tuple[Shape, Training]) -> None:
    shape, one = drawn
    both = replace(one, on_gpu=True, zero_stage=3, offload=("optimizer", "parameters"))
    there, here = training_terms(shape, both), training_terms(shape, replace(both, offload=()))
    whole, before = sum(t.nbytes for t in there), sum(t.nbytes for t in here)
    assert sum(t.nbytes for t in there if t.place == "device") < before
    assert before <= whole <= before + one.trained * 4 / one.ranks  # the host keeps the gradients' block

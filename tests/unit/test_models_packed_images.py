"""Packed rows with images equal single sequences that transformers' own processor and model compute."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.models.files.loading import load_causal_lm
from rlhf.models.files.tiny_vision import KINDS
from rlhf.models.packed.branches import Branch
from rlhf.models.packed.forward import hidden_states
from rlhf.models.packed.images import CACHED_BYTES, ImageReader, image_reader
from rlhf.models.packed.row_check import check_rows
from rlhf.models.packed.row_layout import RowLayout
from rlhf.vision.kinds import is_never_computed, is_vision_weight
from tests.fixtures.vision_models import Seeing, picture, seeing

CPU = torch.device("cpu")
RED, BLUE, WIDE = picture("red"), picture("blue"), picture("green", (64, 32))
QUESTIONS: list[tuple[list[Any], list[int]]] = [
    (["Is ", WIDE, " like ", RED, "?"], [8, 9, 10, 11]),
    (["How are you?"], [12, 13]),
    ([RED, "Colour?"], [1, 2, 3]),
    ([BLUE, "Colour?"], [4, 5, 6, 7, 8]),
]
# LLaVA-OneVision alone cuts an image into tiles only if a text has no other image; here each image counts alone.
ALONE = {"llava_onevision": QUESTIONS[1:]}


# Positions of three axes; the same with linear attention; images that see both ways.
QUICK = ("qwen3_vl", "qwen3_5", "gemma3")


@pytest.fixture(
    scope="module", params=[kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def sees(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seeing:
    model = seeing(request.param, tmp_path_factory.mktemp("vision"))
    layout = check_rows(model.model, CPU)
    assert layout is (RowLayout.ONE_BY_ONE if request.param == "gemma3" else RowLayout.SHARED_PROMPTS)
    return model


def questions(sees: Seeing) -> list[tuple[list[Any], list[int]]]:
    return ALONE.get(sees.folder.name, QUESTIONS)


def gradient(model: Any, states: Tensor) -> Tensor:
    """Return the gradient of all weights for a fixed weighting of hidden states."""
    model.zero_grad()
    weights = torch.linspace(-1.0, 1.0, states.numel()).view_as(states)
    (states * weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def close(states: Tensor, expected: Tensor) -> None:
    error = ((states - expected).norm(dim=-1) / expected.norm(dim=-1)).max()
    assert error.item() <= 1e-5


def test_a_row_of_several_sequences_equals_single_sequences(sees: Seeing) -> None:
    rows = questions(sees)
    ids = [sees.ids(*row) for row in rows]
    expected = torch.cat([sees.own_states(*row) for row in rows])
    states = hidden_states(sees.model, torch.cat(ids), torch.tensor([*map(len, ids)]))  # not in order of length
    close(states, expected)
    wanted = gradient(sees.model, torch.cat([sees.own_states(*row) for row in rows]))
    actual = gradient(sees.model, hidden_states(sees.model, torch.cat(ids), torch.tensor([*map(len, ids)])))
    assert float((actual - wanted).norm() / wanted.norm()) <= 1e-5
    tower = [name for name, p in sees.model.named_parameters() if is_vision_weight(name) and p.grad is not None]
    assert len(tower) > 10


def test_responses_to_an_image_share_the_computation_of_the_image(sees: Seeing) -> None:
    if sees.folder.name == "gemma3":
        pytest.skip("its sequences are computed one by one")
    parts: list[Any] = [BLUE, "Colour?"]
    responses = [[1, 2, 3], [4, 5], [4, 5, 6, 7]]
    ids = [sees.ids(parts, response) for response in responses]
    prompt = len(sees.ids(parts, []))
    branches = [None, Branch(of=0, length=prompt), Branch(of=1, length=prompt + 2)]
    cuts = [0, prompt, prompt + 2]
    expected = [sees.own_states(parts, r)[cut:] for r, cut in zip(responses, cuts, strict=True)]
    row = torch.cat([one[cut:] for one, cut in zip(ids, cuts, strict=True)])
    lengths = torch.tensor([len(one) - cut for one, cut in zip(ids, cuts, strict=True)])
    passes = []
    reader = image_reader(sees.model)
    assert reader is not None
    inputs = reader.inputs
    try:
        reader.inputs = lambda key: passes.append(key) or inputs(key)  # type: ignore[method-assign, func-returns-value]
        close(hidden_states(sees.model, row, lengths, branches), torch.cat(expected))
    finally:
        reader.inputs = inputs  # type: ignore[method-assign]
    assert len(passes) <= 2  # the pixels once, and the grid once for positions
    wanted = gradient(
        sees.model, torch.cat([sees.own_states(parts, r)[cut:] for r, cut in zip(responses, cuts, strict=True)])
    )
    actual = gradient(sees.model, hidden_states(sees.model, row, lengths, branches))
    assert float((actual - wanted).norm() / wanted.norm()) <= 1e-5


def test_a_sampled_image_token_is_text(sees: Seeing) -> None:
    reader = image_reader(sees.model)
    assert reader is not None
    token = reader.processing.image_token_id
    embedding = sees.model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[310] = embedding[token]  # transformers would take the token itself for an image
        ids = [sees.ids([RED, "Colour?"], [1, token, 3]), sees.ids(["How?"], [token])]
        expected = [sees.own_states([RED, "Colour?"], [1, 310, 3]), sees.own_states(["How?"], [310])]
        close(hidden_states(sees.model, torch.cat(ids), torch.tensor([*map(len, ids)])), torch.cat(expected))


def test_another_image_gives_other_states(sees: Seeing) -> None:
    with torch.no_grad():
        ids = [sees.ids([image, "Colour?"], [1, 2]) for image in (RED, BLUE)]
        assert len(ids[0]) == len(ids[1])
        states = hidden_states(sees.model, torch.cat(ids), torch.tensor([*map(len, ids)])).split(len(ids[0]))
    assert float((states[0][-1] - states[1][-1]).norm() / states[0][-1].norm()) > 1e-3


def test_a_part_of_an_image_is_an_error_and_the_token_of_an_empty_microbatch_is_none(sees: Seeing) -> None:
    ids = sees.ids([RED, "Colour?"], [1])
    inside = int((ids < 0).nonzero()[0])
    with pytest.raises(ValueError, match="positions of an image"):
        hidden_states(sees.model, ids[inside + 1 :], torch.tensor([len(ids) - inside - 1]))
    with torch.no_grad():
        assert hidden_states(sees.model, ids[inside : inside + 1].repeat(2), torch.tensor([1, 1])).isfinite().all()


def test_processed_images_are_kept_up_to_a_size(tmp_path: Path) -> None:
    sees = seeing("qwen3_vl", tmp_path)
    processing = image_reader(sees.model).processing  # type: ignore[union-attr]
    keys = [sees.add(picture(colour)) for colour in ("red", "blue", "green")]
    calls: list[Any] = []
    process = processing.model_inputs
    processing.model_inputs = lambda images: calls.append(images) or process(images)  # type: ignore[method-assign, func-returns-value]
    size = sum(value.nbytes for value in process([picture("red")]).values())
    for cached_bytes, expected in ((CACHED_BYTES, 3), (2 * size, 6)):  # in turn, two of three are never the next
        calls.clear()
        reader = ImageReader(processing, cached_bytes=cached_bytes)
        reader.store = sees.store
        for key in keys * 2:
            reader.inputs(key)
        assert len(calls) == expected


def test_recomputed_layers_give_the_same_gradient(tmp_path: Path) -> None:
    states, gradients = [], []
    for recomputes in (False, True):
        folder = tmp_path / str(recomputes)
        sees = seeing("qwen3_vl", folder, load=partial(load_causal_lm, gradient_checkpointing=recomputes))
        ids = [sees.ids(*row) for row in QUESTIONS]
        states.append(hidden_states(sees.model, torch.cat(ids), torch.tensor([*map(len, ids)])))
        gradients.append(gradient(sees.model, states[-1]))
    assert torch.equal(*states)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layer", [-1, -2, [0, 1]])
def test_weights_behind_the_read_layer_of_a_tower_are_never_computed(layer: int | list[int], tmp_path: Path) -> None:
    sees = seeing("llava_onevision", tmp_path)
    sees.model.config.vision_feature_layer = layer
    if isinstance(layer, list):
        sees.model.model.multi_modal_projector.linear_1 = torch.nn.Linear(64 * len(layer), 128)
    sees.own_states([RED, "Colour?"], [1, 2]).sum().backward()
    weights = dict(sees.model.named_parameters())
    weights = {name: p for name, p in weights.items() if not name.endswith("k_proj.bias")}  # cancels in the softmax
    unused = {name for name, p in weights.items() if is_vision_weight(name) and (p.grad is None or not p.grad.any())}
    assert unused == {name for name in weights if is_never_computed(sees.model.config, name)}
    assert len(unused) > 1

"""A client's rows with images through packed rows equal transformers' own pass over single rows, with gradients."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

from rlhf.adapters import LossRows, NamedLoss
from rlhf.errors import UserError
from rlhf.models.adapters.slot import AdapterSlot
from rlhf.models.files.loading import load_causal_lm
from rlhf.models.files.tiny_vision import build_tiny_vision
from rlhf.models.packed.images import open_images
from rlhf.models.packed.row_check import check_rows
from rlhf.objectives.client_losses import LOSSES, checked_settings, client_loss
from rlhf.vision.keys import image_keys
from rlhf.vision.kinds import is_vision_weight
from rlhf.workers.adapters.adapter_worker import merged_report
from tests.fixtures.adapter_rank import SHAPE, OnlyRank, with_adapter
from tests.seen_logprobs import BLUE, RED, SeenModel

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["qwen2_5_vl", "idefics3"])
def seen(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> SeenModel:
    folder = tmp_path_factory.mktemp("seen")
    return SeenModel(build_tiny_vision(folder / "model", request.param, seed=0), folder / "images")


@pytest.fixture(scope="module")
def model(seen: SeenModel) -> Any:
    """Return a model with a slot of rank 4 that holds a random adapter of rank 3."""
    torch.manual_seed(0)
    model = with_adapter(load_causal_lm(str(seen.folder), dtype=torch.float32))
    open_images(model, seen.store.folder)
    check_rows(model, CPU)
    return model.double()


def before_images(rows: LossRows) -> Tensor:
    """Return which places are before a position of an image in their row."""
    parts = rows.token_ids.split(rows.lengths.tolist())
    return torch.cat([torch.cat([ids[1:] < 0, torch.tensor([False])]) for ids in parts])


def rows_of(seen: SeenModel, loss: str = "cross_entropy") -> LossRows:
    rows = [seen.prompt("What is it?", RED), seen.prompt(RED, "and", BLUE, "?"), seen.prompt("Nothing?")]
    last = seen.prompt(BLUE, "!")
    rows.append(last[next(place for place, token in enumerate(last) if token < 0) :])  # begins with an image
    rows = [(*row, 70, 71, 72) for row in rows]
    tokens = torch.tensor([token for row in rows for token in row])
    targets = torch.tensor([token for row in rows for token in (*row[1:], 73)]).clamp(min=0)[:, None]
    generator = torch.Generator().manual_seed(3)
    bare = LossRows(token_ids=tokens, lengths=torch.tensor(list(map(len, rows))), targets=targets)
    counts = (~before_images(bare))[:, None].float()
    columns = {"weights": torch.rand(targets.shape, generator=generator) * counts}
    if LOSSES[loss].columns:
        columns["advantages"] = (torch.rand(targets.shape, generator=generator) - 0.5) * counts
        columns["logprobs"] = -torch.rand(targets.shape, generator=generator) * 3.0 - 2.0
    if loss == "gspo":
        columns["sequence_ratio_mask"] = counts
    return replace(bare, columns=columns)


def plain_logprobs(seen: SeenModel, model: Any, rows: LossRows) -> list[Tensor]:
    """Return the log-probabilities of the targets of each row, computed alone by the model's own forward pass."""
    model.model.set_attn_implementation({"text_config": "sdpa"})
    marks = [name for name in ("mm_token_type_ids",) if name in signature(type(model.model).forward).parameters]
    found, sizes = [], rows.lengths.tolist()
    for ids, targets in zip(rows.token_ids.split(sizes), rows.targets.split(sizes), strict=True):
        images = [seen.store.image(key) for key in image_keys(ids.tolist())]
        given = dict.fromkeys(marks if images else [], (ids < 0).long()[None])
        given |= seen.processing.model_inputs(images)
        plain = torch.tensor([seen.processing.plain_ids(ids.tolist())])
        logits = model(input_ids=plain, **given, use_cache=False).logits[0]
        found.append(logits.log_softmax(-1).gather(-1, targets))
    return found


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_of_rows_with_images_equals_a_loop_over_single_rows(seen: SeenModel, model: Any, loss: str) -> None:
    rows = rows_of(seen, loss)
    is_scored = before_images(rows) == 0
    report = merged_report([OnlyRank(model, budget=1000).forward_backward("mine", rows, NamedLoss(name=loss))])
    ours = gradients(model)
    total, sizes = torch.zeros((), dtype=torch.float64), rows.lengths.tolist()
    logprobs = plain_logprobs(seen, model, rows)
    columns = [
        dict(zip(rows.columns, parts, strict=True))
        for parts in zip(*(c.split(sizes) for c in rows.columns.values()), strict=True)
    ]
    for own, given, mask in zip(logprobs, columns, is_scored.split(sizes), strict=True):
        options: dict[str, Any] = {"mask": mask, "lengths": torch.tensor([len(mask)])}
        total = total + client_loss(loss, own, given, settings=checked_settings(loss, {}), **options).terms.sum()
    expected = torch.where(is_scored[:, None], torch.cat(logprobs), 0.0)
    torch.testing.assert_close(report.logprobs, expected.detach().float(), rtol=1e-6, atol=1e-6)
    assert report.loss == pytest.approx(float(total.detach()), rel=1e-9)
    total.backward()
    theirs = gradients(model)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-8, atol=1e-8)
    assert not any(is_vision_weight(name) for name in theirs)
    assert max(float(gradient.abs().max()) for gradient in theirs.values()) > 1e-3


def test_an_image_is_never_a_target(seen: SeenModel, model: Any) -> None:
    worker, loss = OnlyRank(model, budget=1000), NamedLoss(name="cross_entropy")
    good = rows_of(seen)
    place = int(before_images(good).int().argmax())
    for columns in ({}, {"weights": torch.where(torch.arange(len(good.token_ids)) == place, 1.0, 0.0)[:, None]}):
        with pytest.raises(UserError, match=rf"Row 0: the target of token {place} is a position of an image"):
            worker.forward_backward("mine", replace(good, columns=columns), loss)
    ratios = rows_of(seen, "gspo")
    ratios.columns["sequence_ratio_mask"][place] = 1.0
    with pytest.raises(UserError, match="in gspo also sequence_ratio_mask"):
        worker.forward_backward("mine", ratios, NamedLoss(name="gspo"))
    targets = good.targets.clone()
    targets[place] = -5
    with pytest.raises(UserError, match="Row 0: targets has -5, and the model's tokens are 0 to"):
        worker.forward_backward("mine", replace(good, targets=targets), loss)


def test_an_export_names_the_adapted_layers_alone(seen: SeenModel, model: Any, tmp_path: Path) -> None:
    """Names of layers that the vision tower has too become paths."""
    slot = AdapterSlot(model)
    slot.config(SHAPE).save_pretrained(tmp_path)
    fresh = get_peft_model(load_causal_lm(str(seen.folder), dtype=torch.float32), LoraConfig.from_pretrained(tmp_path))
    adapted = {name for name, module in fresh.base_model.model.named_modules() if isinstance(module, LoraLayer)}
    assert adapted == set(slot.layers(SHAPE))

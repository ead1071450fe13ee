"""Likelihoods of examples against a plain forward pass of transformers and peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.engine.distributed import RankContext
from rlhf.errors import UserError
from rlhf.models.on_disk import find_model
from rlhf.types import Examples
from rlhf.workers.frozen.likelihood import LikelihoodWorker

PLACE = RankContext(rank=0, world_size=1, local_rank=0, local_world_size=1, device="cpu", threads=1, deadline_s=60.0)
LENGTHS = [5, 9, 3, 7]


@pytest.fixture(scope="module")
def examples() -> Examples:
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    mask = torch.rand(total, generator=generator) < 0.6
    for start, length in zip((0, 5, 14, 17), LENGTHS, strict=True):
        mask[start] = False
        mask[start + length - 1] = True
    return Examples(
        sequence_ids=torch.arange(4),
        lengths=torch.tensor(LENGTHS),
        token_ids=torch.randint(0, 256, (total,), generator=generator),
        loss_mask=mask,
    )


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def measured(path: Path, examples: Examples, *, max_tokens: int) -> list[tuple[int, float, int]]:
    source = find_model(str(path), trust_remote_code=False)
    worker = LikelihoodWorker(source, PLACE, max_tokens_per_microbatch=max_tokens)
    worker.start()
    return [(one.num_tokens, one.logprob, one.num_top1) for one in worker.measure(examples)]


def plain(model: Any, examples: Examples) -> list[tuple[int, float, int]]:
    found = []
    for ids, mask in zip(examples.token_ids.split(LENGTHS), examples.loss_mask.split(LENGTHS), strict=True):
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        chosen = logprobs.gather(1, ids[1:, None])[:, 0][mask[1:]]
        top1 = (logprobs.argmax(-1) == ids[1:])[mask[1:]]
        found.append((int(mask.sum()), float(chosen.sum()), int(top1.sum())))
    return found


@pytest.mark.parametrize("max_tokens", [9, 64])
def test_likelihoods_are_those_of_a_plain_forward_pass(tiny_model: Path, examples: Examples, max_tokens: int) -> None:
    expected = plain(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval(), examples)
    for found, wanted in zip(measured(tiny_model, examples, max_tokens=max_tokens), expected, strict=True):
        assert found == (wanted[0], pytest.approx(wanted[1], abs=1e-4), wanted[2])


def test_an_adapter_is_part_of_the_model(tiny_model: Path, adapter: Path, examples: Examples) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    expected = plain(peft.PeftModel.from_pretrained(base, adapter).eval(), examples)
    without = measured(tiny_model, examples, max_tokens=64)
    for found, wanted, bare in zip(measured(adapter, examples, max_tokens=64), expected, without, strict=True):
        assert found == (wanted[0], pytest.approx(wanted[1], abs=1e-4), wanted[2])
        assert abs(found[1] - bare[1]) > 1e-3


def test_an_adapter_of_another_model_is_refused(adapter: Path, examples: Examples, tmp_path: Path) -> None:
    for file in adapter.iterdir():
        text = file.read_bytes()
        (tmp_path / file.name).write_bytes(text)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 2'))
    with pytest.raises(UserError, match="cannot be put on its base model"):
        measured(tmp_path, examples, max_tokens=64)

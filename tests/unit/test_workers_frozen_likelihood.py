"""Likelihoods of examples against a plain forward pass of transformers and peft."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.errors import UserError
from rlhf.models.on_disk import find_model
from rlhf.workers.frozen.likelihood import LikelihoodWorker
from tests.fixtures.models import change_json
from tests.fixtures.workers import PLACE, random_examples

EXAMPLES = random_examples()


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


def measured(path: Path, *, max_tokens: int = 64) -> list[tuple[int, float, int]]:
    source = find_model(str(path), trust_remote_code=False, device="cpu")
    worker = LikelihoodWorker(source, PLACE, max_tokens_per_microbatch=max_tokens)
    worker.start()
    return [(one.num_tokens, one.logprob, one.num_top1) for one in worker.measure(EXAMPLES)]


def plain(model: Any) -> list[tuple[int, float, int]]:
    found, lengths = [], EXAMPLES.lengths.tolist()
    for ids, mask in zip(EXAMPLES.token_ids.split(lengths), EXAMPLES.loss_mask.split(lengths), strict=True):
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        chosen = logprobs.gather(1, ids[1:, None])[:, 0][mask[1:]]
        top1 = (logprobs.argmax(-1) == ids[1:])[mask[1:]]
        found.append((int(mask.sum()), float(chosen.sum()), int(top1.sum())))
    return found


@pytest.mark.parametrize("max_tokens", [9, 64])
def test_likelihoods_are_those_of_a_plain_forward_pass(tiny_model: Path, max_tokens: int) -> None:
    expected = plain(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval())
    for found, wanted in zip(measured(tiny_model, max_tokens=max_tokens), expected, strict=True):
        assert found == (wanted[0], pytest.approx(wanted[1], abs=1e-4), wanted[2])


def test_an_adapter_is_part_of_the_model(tiny_model: Path, adapter: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    expected = plain(peft.PeftModel.from_pretrained(base, adapter).eval())
    for found, wanted, bare in zip(measured(adapter), expected, measured(tiny_model), strict=True):
        assert found == (wanted[0], pytest.approx(wanted[1], abs=1e-4), wanted[2])
        assert abs(found[1] - bare[1]) > 1e-3


def test_an_adapter_of_another_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    change_json(tmp_path / "adapter_config.json", r=2)
    with pytest.raises(UserError, match="cannot be put on its base model"):
        measured(tmp_path)

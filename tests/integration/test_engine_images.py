"""A real engine sees the images of prompts as transformers does, also after a sync, and says so where it cannot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from actors.weights.adapter import AdapterSender
from actors.weights.shm import ShmSender
from rlhf.controller.weight_sync import check_probe
from rlhf.errors import RunError
from rlhf.models.files.tiny_vision import KINDS, build_tiny_vision
from rlhf.models.files.weights import adapter_sources
from rlhf.vision.kinds import SEE_BOTH_WAYS
from rlhf.vision.sight import exchanged_images, image_effect
from tests.integration.engine_helpers import SAMPLING, call, engine, sequences, spec, sync
from tests.integration.seen_engine import (
    asked,
    engine_differences,
    prompts_of,
    published,
    snapshot_differences,
    with_frozen_tower,
    worst,
)
from tests.seen_logprobs import BLUE, RED, SeenModel


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> SeenModel:
    folder = tmp_path_factory.mktemp("seeing")
    return SeenModel(build_tiny_vision(folder / "model", "qwen3_vl", seed=0), folder / "images")


@pytest.fixture(scope="module")
def seeing(seen: SeenModel, ray_local: None) -> Iterator[Any]:
    with engine(spec(seen.folder, images=seen.place)) as handle:
        yield handle


def test_an_engine_sees_what_the_trainer_sees_after_every_sync(seeing: Any, seen: SeenModel, sender: ShmSender) -> None:
    """The first sync leaves out the frozen tower. The second changes the tower alone: outputs of the tower that vLLM
    has kept would be those of the first."""
    prompts = prompts_of(seen)
    model = with_frozen_tower(seen, seen.model(seed=1))
    sizes = []
    for version in (1, 2):
        if version == 2:
            model.requires_grad_(True)
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if "visual" in name:
                        weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
        manifest = published(sender, model, version)
        sizes.append(manifest.nbytes)
        sync(seeing, manifest)
        for group_id, token_ids in enumerate(prompts):
            rollouts, infos = call(seeing.generate.remote(asked(token_ids, group_id), SAMPLING))
            assert worst(seen, model, rollouts) < 1e-4, (version, group_id)
            assert {info.num_prompt_tokens for info in infos} == {len(token_ids)}
            assert next(sequences(rollouts))["token_ids"][: len(token_ids)].tolist() == list(token_ids)
        probe = (*prompts[1], *range(16))
        own = call(seeing.probe.remote(probe))
        ours = [x for x, token in zip(seen.logprobs(model, probe).tolist(), probe, strict=True) if token >= 0][1:]
        assert check_probe(ours, own, engine=0, version=version, dtype="float32") < 1e-4
        other = call(seeing.probe.remote(exchanged_images(probe, seen.store)))
        assert image_effect(own, other, probe) > 1e-3
    tower = 4 * sum(weight.numel() for name, weight in model.named_parameters() if "visual" in name)
    assert tower <= sizes[1] - sizes[0] < 1.02 * tower  # each weight begins at a multiple of 64 bytes


def test_other_expansions_than_vllms_are_refused(seeing: Any, seen: SeenModel, sender: ShmSender) -> None:
    sync(seeing, published(sender, seen.model(seed=1), 3))
    whole = seen.prompt(RED, "What is it?")
    first = next(i for i, token in enumerate(whole) if token < 0)
    for token_ids in (whole[:first] + whole[first + 1 :], (*whole[:first], whole[first], *whole[first:])):
        with pytest.raises(RunError, match=r"image [0-9a-f]{15} \(48x32 pixels\): vLLM expands the image to 6 tokens"):
            call(seeing.generate.remote(asked(token_ids, 9), SAMPLING))
    missing = tuple(-7 if token < 0 else token for token in whole)
    with pytest.raises(RunError, match="000000000000007 cannot be read"):
        call(seeing.generate.remote(asked(missing, 10), SAMPLING))


@pytest.mark.slow
@pytest.mark.parametrize("keeps", ["recompute", "keep"])
def test_updates_in_flight_change_the_tower_of_running_samples(
    keeps: str, seen: SeenModel, sender: ShmSender, ray_local: None
) -> None:
    """Tokens after an update are sampled by the new weights, with the new tower or with old keys and values."""
    old, new = seen.model(seed=1), seen.model(seed=2)
    group = asked(seen.prompt(RED, "Tell a long story about the picture."), 1, samples=8)
    longer = replace(SAMPLING, max_new_tokens=200)
    settings = spec(seen.folder, images=seen.place, kv_after_update=keeps, max_num_seqs=8)
    with engine(settings) as handle:
        sync(handle, published(sender, old, 1))
        running = handle.answer.remote(group, longer, 1)
        waiting = handle.answer.remote(asked(group.prompt.token_ids, 2, samples=8), longer, 1)  # no place in the batch
        call(handle.until_tokens.remote(5))
        sync(handle, published(sender, new, 2))
        changed = 0
        for sequence in sequences(call(running)[0]):
            ids, versions = sequence["token_ids"].tolist(), sequence["versions"]
            theirs = sequence["rollout_logprobs"]
            assert (seen.logprobs(old, ids) - theirs)[versions == 1].abs().max() < 1e-3
            if keeps == "recompute" and (versions == 2).any():
                changed += 1
                assert (seen.logprobs(new, ids) - theirs)[versions == 2].abs().max() < 1e-3
            elif (versions == 2).any():  # neither the old weights nor the new ones alone
                changed += 1
                assert (seen.logprobs(new, ids) - theirs)[versions == 2].abs().mean() > 1e-2
        assert changed
        last, _ = call(handle.answer.remote(asked(group.prompt.token_ids, 3), SAMPLING, 1))
        later = [s for s in sequences(call(waiting)[0]) if set(s["versions"].tolist()) == {-1, 2}]
        for sequence in [*later, *sequences(last)]:
            sampled = sequence["response_mask"]
            ours = seen.logprobs(new, sequence["token_ids"].tolist())[sampled]
            assert (ours - sequence["rollout_logprobs"][sampled]).abs().max() < 1e-3


@pytest.mark.slow
def test_interrupted_responses_to_images_are_continued(
    seen: SeenModel, sender: ShmSender, ray_local: None, tmp_path: Path
) -> None:
    sampling = replace(SAMPLING, max_new_tokens=60)
    whole = asked(seen.prompt(RED, "Tell me a story."), 1, samples=4)
    (tmp_path / "spool").mkdir()
    with engine(spec(seen.folder, images=seen.place, spool=tmp_path / "spool", carries_over=True)) as handle:
        model = seen.model(seed=1)
        sync(handle, published(sender, model, 1))
        expected, _ = call(handle.generate.remote(whole, sampling))
        call(handle.hold.remote())
        cut = handle.generate.options(num_returns=1).remote(replace(whole, group_id=11), sampling)
        call(handle.release.remote(1))
        call(handle.interrupt.remote([11], 20))
        assert call(cut) == (None, None)
        sync(handle, published(sender, model, 2))
        found, _ = call(handle.generate.remote(replace(whole, group_id=12, continues=11), sampling))
        assert found.token_ids.tolist() == expected.token_ids.tolist()
        assert set(found.versions.tolist()) == {-1, 1, 2}
        assert torch.allclose(found.rollout_logprobs, expected.rollout_logprobs, atol=1e-4)


@pytest.mark.slow
def test_an_adapter_of_the_language_model_is_sent_alone(seen: SeenModel, ray_local: None, tmp_path: Path) -> None:
    base = AutoModelForImageTextToText.from_pretrained(seen.folder, dtype=torch.float32).eval()
    config = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*(q_proj|v_proj|o_proj|up_proj)")
    policy = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    fields = json.loads(json.dumps(config.to_dict(), default=sorted))
    sender = AdapterSender(tmp_path / "adapter", fields, base="tiny", rank=0)
    with engine(spec(seen.folder, images=seen.place, lora_rank=4)) as handle:
        sync(handle, sender.publish(((source.name, source.make()) for source in adapter_sources(policy)), 1))
        rollouts, _ = call(handle.generate.remote(asked(seen.prompt(RED, BLUE, "Equal?"), 1), SAMPLING))
        assert worst(seen, policy.get_base_model(), rollouts) < 1e-4
        with policy.disable_adapter():
            assert worst(seen, policy.get_base_model(), rollouts) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_engines_see_as_transformers_with_every_kind(kind: str, ray_local: None, tmp_path: Path) -> None:
    differences = engine_differences(kind, tmp_path)
    if json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] in SEE_BOTH_WAYS:
        assert min(differences) > 1e-2  # so engines of this kind are refused on a CPU (rlhf/models/support.py)
    else:
        assert max(differences) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in SEE_BOTH_WAYS])
def test_engines_read_snapshots_of_all_weights_of_every_kind(kind: str, ray_local: None, tmp_path: Path) -> None:
    assert max(snapshot_differences(kind, tmp_path)) < 1e-4

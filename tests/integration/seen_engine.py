"""Engines with images beside transformers: prompts, requests, and differences of log-probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from actors.rollout.adapter_shelf import ServedAdapter
from actors.rollout.whole_engines import WholeEngine
from actors.weights.files import FILES, files_checksum, mapped_files
from actors.weights.shm import ShmSender
from rlhf.models.files.tiny_vision import build_tiny_vision
from rlhf.models.files.weights import sources_without_tower
from rlhf.roles import PolicyProbe
from rlhf.types import GroupRequest, Prompt
from rlhf.vision.kinds import is_vision_weight
from rlhf.workers.trained_model import freeze_vision
from tests.integration.engine_helpers import SAMPLING, call, engine, sequences, spec, sync
from tests.seen_logprobs import BLUE, RED, SeenModel


def published(sender: ShmSender, model: Any, version: int) -> Any:
    """Publish all weights, or with a frozen tower the weights of the language model."""
    weights = (weight for source in sources_without_tower(model) for weight in source.published())
    return sender.publish(weights, version)


def with_frozen_tower(seen: SeenModel, model: Any) -> Any:
    """Return the model with the tower of the folder, frozen."""
    weights = dict(seen.model(seed=0, std=0.0).named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if is_vision_weight(name):
                weight.copy_(weights[name])
    freeze_vision(model)
    return model


def asked(token_ids: tuple[int, ...], group_id: int, samples: int = 3) -> GroupRequest:
    prompt = Prompt(prompt_id=group_id, token_ids=token_ids, text="", columns={})
    seeds = tuple(100 * group_id + sample for sample in range(samples))
    return GroupRequest(group_id=group_id, prompt=prompt, seeds=seeds, first_sequence_id=group_id * samples)


def prompts_of(seen: SeenModel) -> list[tuple[int, ...]]:
    """Return prompts without an image, with an image and with two images, also with equal images."""
    return [
        seen.prompt("How are you?"),
        seen.prompt(RED, "Which colour is it?"),
        seen.prompt(BLUE, "Which colour is it?"),
        seen.prompt("Is ", RED, BLUE, " two colours?"),
        seen.prompt(RED, RED, "Equal?"),
    ]


def worst(seen: SeenModel, model: Any, rollouts: Any) -> float:
    """Return the largest difference of the sampled tokens' log-probabilities from transformers'."""
    differences = []
    for sequence in sequences(rollouts):
        sampled = sequence["response_mask"]
        ours = seen.logprobs(model, sequence["token_ids"].tolist())[sampled]
        differences.append(float((ours - sequence["rollout_logprobs"][sampled]).abs().max()))
    return max(differences)


def engine_differences(kind: str, folder: Path) -> tuple[float, float]:
    """Return the largest differences in nats of an engine with the folder's weights, and of one after a sync.

    The first sync leaves out the frozen tower, and the second brings other weights for the tower, too. Ray must run.
    """
    seen = SeenModel(build_tiny_vision(folder / "model", kind, seed=0), folder / "images")

    def worst_of_all(handle: Any, model: Any) -> float:
        asks = [handle.generate.remote(asked(ids, number), SAMPLING) for number, ids in enumerate(prompts_of(seen))]
        return max(worst(seen, model, call(ask)[0]) for ask in asks)

    with engine(spec(seen.folder, images=seen.place, transport=None)) as handle:
        before = worst_of_all(handle, seen.model(seed=0, std=0.0))
    sender, model, frozen = ShmSender(rank=0), seen.model(seed=1), with_frozen_tower(seen, seen.model(seed=2))
    try:
        with engine(spec(seen.folder, images=seen.place)) as handle:
            sync(handle, published(sender, frozen, 1))
            kept = worst_of_all(handle, frozen)
            sync(handle, published(sender, model, 2))
            return before, max(kept, worst_of_all(handle, model))
    finally:
        sender.close()


def snapshot_differences(kind: str, folder: Path) -> list[float]:
    """Return the largest difference of a proof for each of two snapshots in model folders, read in turns. Ray must run.

    The snapshots have the frozen tower of the engine's own folder.
    """
    seen = SeenModel(build_tiny_vision(folder / "model", kind, seed=0), folder / "images")
    probe, snapshots = (*seen.prompt(RED, "Which colour is it?"), *range(16)), []
    for number in (1, 2):
        model = with_frozen_tower(seen, seen.model(seed=number))
        model.save_pretrained(folder / str(number))
        pairs = zip(seen.logprobs(model, probe).tolist(), probe, strict=True)
        logprobs = tuple(logprob for logprob, token in pairs if token >= 0)[1:]
        proof = PolicyProbe(version=0, token_ids=probe, logprobs=logprobs, dtype="float32")
        checksum = files_checksum(mapped_files(folder / str(number)))
        snapshots.append(
            ServedAdapter(name="a", number=number, folder=folder / str(number), checksum=checksum, probe=proof)
        )
    with engine(spec(seen.folder, images=seen.place, transport=FILES), worker=WholeEngine) as handle:
        return [call(handle.load_adapter.remote(snapshot)) for snapshot in (*snapshots, snapshots[0])]

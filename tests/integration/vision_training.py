"""Training on texts and images in one rank of a gang: responses to prompts, pairs, examples, values."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rlhf.config.derive import teachers
from rlhf.config.files.load import load
from rlhf.config.schema.root import Config
from rlhf.engine.consolidation import load_trained_weights
from rlhf.models.files.loading import load_causal_lm
from rlhf.models.files.tiny_vision import build_tiny_vision
from rlhf.models.files.weights import weight_sources
from rlhf.preflight.inputs import StageInputs, load_inputs
from rlhf.preflight.training_data import OfflineInputs, collated
from rlhf.tracking.metrics.declarations import merge_metrics, results
from rlhf.tracking.run_folder.folder import images_folder
from rlhf.types import (
    ONLY_TEACHER,
    BatchPlan,
    Examples,
    LabelledSteps,
    MinibatchPlan,
    Pairs,
    Rollouts,
    TokenValues,
)
from rlhf.vision.kinds import is_vision_weight
from rlhf.vision.processor import ImageProcessing
from rlhf.vision.store import ImageStore
from rlhf.workers.frozen.teacher import OnlineTeacherWorker
from rlhf.workers.frozen.top_settings import spans_of, top_of
from rlhf.workers.offline.pairs import PreferenceWorker, RewardModelWorker
from rlhf.workers.offline.referenced import ReferencedPolicy
from rlhf.workers.offline.step_rewards import StepRewardWorker
from rlhf.workers.offline.supervised import SupervisedWorker
from rlhf.workers.offline.unpaired import UnpairedWorker
from rlhf.workers.online.critic import CriticWorker
from rlhf.workers.online.pairs import OnlinePreferenceWorker
from rlhf.workers.online.policy import PolicyWorker
from rlhf.workers.online.streamed import StreamedPolicyWorker
from rlhf.workers.online.student import StudentWorker
from rlhf.workers.trained_model import load_trained_model
from tests.fixtures.vision_models import picture
from tests.fixtures.workers import make_update
from tests.integration.gang_workers import worker_config
from tests.integration.rank_gang import place_of

GROUPS, SAMPLES, ROWS = 4, 2, 4  # groups and rows of even numbers have images, and belong to rank 0 of two
OFFLINE: Mapping[str, Any] = {
    "sft": SupervisedWorker,
    "dpo": PreferenceWorker,
    "kto": UnpairedWorker,
    "reward_model": RewardModelWorker,
    "process_reward_model": StepRewardWorker,
}
ONLINE: Mapping[str, Any] = {
    "grpo": PolicyWorker,
    "streamed": StreamedPolicyWorker,
    "online_dpo": OnlinePreferenceWorker,
    "sampled_teacher": StudentWorker,
    "whole_teacher": StudentWorker,
}
ALGORITHMS: Mapping[str, Mapping[str, Any]] = {
    "streamed": {"name": "grpo"},
    "sampled_teacher": {"name": "on_policy_distillation"},
    "whole_teacher": {"name": "on_policy_distillation", "divergence": "reverse_kl"},
}


def prompt_of(number: int, model: str, folder: Path) -> Tensor:
    """Return a prompt of text alone, or of a text, one or two images and a text."""
    processing, store = ImageProcessing.of_model(model), ImageStore(folder / "images")
    assert processing is not None
    if number % 2:
        return torch.tensor([65 + number, 66, 67, 68, 69])
    keys = [_added(store, picture(c, (48, 32))) for c in (["red", "blue"] if number % 4 else ["green"])]
    text = [70 + number, 71, *[processing.placeholder_id] * len(keys), 72]
    return torch.tensor(processing.expand(text, keys, store))


def _added(store: ImageStore, image: Image.Image) -> int:
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    return store.add(encoded.getvalue())


def answer_of(number: int, length: int) -> Tensor:
    random = torch.Generator().manual_seed(number)
    return torch.randint(3, 250, (length,), generator=random)


def rollouts_of(group: int, model: str, folder: Path) -> Rollouts:
    prompt = prompt_of(group, model, folder)
    answers = [answer_of(10 * group + i, 3 + i) for i in range(SAMPLES)]
    mask = torch.cat([torch.arange(len(prompt) + len(answer)) >= len(prompt) for answer in answers])
    return Rollouts(
        sequence_ids=torch.arange(group * SAMPLES, (group + 1) * SAMPLES),
        lengths=torch.tensor([len(prompt) + len(answer) for answer in answers]),
        token_ids=torch.cat([part for answer in answers for part in (prompt, answer)]),
        response_mask=mask,
        rollout_logprobs=torch.where(mask, -5.0, 0.0),
        versions=torch.where(mask, 0, -1),
    )


def examples_of(model: str, folder: Path, *, answers: int) -> tuple[Examples, list[int]]:
    parts, masks, lengths, sizes = [], [], [], []
    for row in range(ROWS):
        prompt = prompt_of(row, model, folder)
        sizes.append(len(prompt))
        for side in range(answers):
            whole = torch.cat([prompt, answer_of(10 * row + side, 4 + side)])
            parts.append(whole)
            masks.append(torch.arange(len(whole)) >= len(prompt))
            lengths.append(len(whole))
    ids = torch.arange(len(lengths))
    examples = Examples(
        sequence_ids=ids, lengths=torch.tensor(lengths), token_ids=torch.cat(parts), loss_mask=torch.cat(masks)
    )
    return examples, sizes


def of_rank(numbers: int, ranks: int) -> tuple[tuple[int, ...], ...]:
    return (tuple(range(numbers)),) if ranks == 1 else (tuple(range(0, numbers, 2)), tuple(range(1, numbers, 2)))


def settings(name: str, model: str, folder: Path, *, ranks: int, tokens: int, **options: Any) -> Config:
    is_online, stage = name == "ppo" or name in ONLINE, options["zero_stage"]
    sections: dict[str, Any] = {
        "policy": {"vision_lr": options["vision_lr"], "lora": options.get("lora")},
        "cluster": {"roles": {"policy": {"zero_stage": stage}}},
        "train": {"lr": 1e-3, "sequences_per_update": GROUPS * SAMPLES if is_online else ROWS},
    }
    if name == "online_dpo":
        sections["train"]["sequences_per_update"] = GROUPS
    if is_online:
        sections["data"] = {"max_prompt_tokens": 40}
        sections["rollouts"] = {"prompts_per_step": GROUPS, "samples_per_prompt": SAMPLES}
    if name == "streamed":
        sections["train"]["streamed"] = True
    if name.endswith("teacher"):
        sections["teacher"] = {"model": str(build_tiny_vision(folder / "teacher", "qwen3_vl", seed=1))}
        sections["teacher"]["dtype"] = "float32"
    if name == "ppo":
        sections["critic"] = {"model": model, "dtype": "float32", "vision_lr": options["vision_lr"]}
        sections["cluster"]["roles"]["critic"] = {"zero_stage": stage, "workers": ranks}
    return worker_config(
        ALGORITHMS.get(name, {"name": name}),
        model,
        str(folder),
        workers=ranks,
        tokens=tokens,
        is_online=is_online,
        **sections,
    )


def train_rank(
    rank: int, world_size: int, *, name: str, model: str, folder: str, tokens: int, **options: Any
) -> list[Any]:
    """Run one rank: metrics of two optimizer steps on the same batch, and how far tower and layers moved."""
    path = Path(folder)
    config = settings(name, model, path, ranks=world_size, tokens=tokens, **options)
    place = replace(place_of(rank, world_size), images=path / "images")
    if name == "ppo":
        assert config.critic is not None
        worker: Any = CriticWorker(config, config.critic, place, optimizer_steps=2)
    else:
        worker = {**ONLINE, **OFFLINE}[name](config, place, optimizer_steps=2)
    worker.build()
    before = _weights(worker)
    steps = _offline(worker, name, model, path) if name in OFFLINE else _online(worker, model, path)
    after = _weights(worker)
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    tower = [move for name, move in moved.items() if is_vision_weight(name)]
    return [*steps, max(tower), max(move for name, move in moved.items() if not is_vision_weight(name))]


def resume_rank(
    rank: int, world_size: int, *, model: str, folder: str, saved: str, tokens: int, saves: bool, **options: Any
) -> list[Any]:
    """Run one rank: make a step and save, or load; then the next step's metrics. Compare an export with the weights."""
    path = Path(folder)
    config = settings("grpo", model, path, ranks=world_size, tokens=tokens, **options)
    place = replace(place_of(rank, world_size), images=path / "images")
    worker = PolicyWorker(config, place, optimizer_steps=4)
    worker.build()
    if saves:
        _online(worker, model, path)
        worker.save(Path(saved))
        weights = _weights(worker)
        module = load_trained_model(config.policy, load_causal_lm, worker.device)
        load_trained_weights(module, Path(saved), dtype=torch.float32)
        exported = {name: weight for source in weight_sources(module) for name, weight in source.published()}
        assert all(torch.equal(weights[name], exported[name]) for name in weights)
    else:
        worker.load(Path(saved))
    return _online(worker, model, path)


def imitate_rank(rank: int, world_size: int, *, folder: str, steps: int) -> list[float]:
    """Imitate the colours of squares, read from a file of rows with images. Return the loss of each step."""
    path = Path(folder)
    rows = []
    for i, colour in enumerate(("red", "blue", "green", "yellow") * 4):
        picture(colour).save(path / f"{i}.png")
        question = [{"type": "image", "image": f"{i}.png"}, {"type": "text", "text": "Colour?"}]
        answer = {"role": "assistant", "content": colour}
        rows.append({"messages": [{"role": "user", "content": question}, answer]})
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (path / "run.yaml").write_text(
        f"run: {{name: colours, dir: {folder}}}\n"
        "policy: {model: 'tiny:qwen3_vl', dtype: float32, vision_lr: 0.003}\n"
        f"algorithm: {{name: sft}}\ndata: {{train: {folder}/rows.jsonl}}\n"
        f"train: {{steps: {steps}, lr: 0.003, sequences_per_update: 16, max_tokens_per_microbatch: 300}}\n"
    )
    (stage,) = load_inputs(load(path / "run.yaml", []))
    assert isinstance(stage, StageInputs)
    assert isinstance(stage.inputs, OfflineInputs)
    place = replace(place_of(rank, world_size), images=images_folder(path / "colours"))
    worker = SupervisedWorker(stage.config, place, optimizer_steps=steps)
    worker.build()
    data: Any = collated(stage.config, stage.inputs.rows)
    worker.load_data(data)
    count, num_rows = int(data.loss_mask.sum()), len(stage.inputs.rows)
    plan = MinibatchPlan(sequences_by_rank=(tuple(range(num_rows)),), num_tokens=count, num_sequences=num_rows)
    losses = [results(merge_metrics([worker.update_on(plan)]))["update/loss/mean"] for _ in range(steps)]
    return [loss * count / num_rows for loss in losses]


def _weights(worker: Any) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in worker.engine.named_weights(torch.float32)}


def _online(worker: Any, model: str, folder: Path) -> list[Any]:
    ranks = worker.place.world_size
    rollouts = [rollouts_of(group, model, folder) for group in range(GROUPS)]
    groups = of_rank(GROUPS, ranks)
    sequences = tuple(tuple(i for g in share for i in range(g * SAMPLES, (g + 1) * SAMPLES)) for share in groups)
    count = sum(int(one.response_mask.sum()) for one in rollouts)
    minibatch = MinibatchPlan(sequences_by_rank=sequences, num_tokens=count, num_sequences=GROUPS * SAMPLES)
    scores = {i: float(i % SAMPLES) for i in range(GROUPS * SAMPLES)}
    plan = BatchPlan(step=1, minibatches=(minibatch, minibatch), scores=scores, kl_coef=0.0, entropy_coef=0.0)
    plan = replace(plan, minibatches=(minibatch,))
    states: list[Any] = []
    if isinstance(worker, OnlinePreferenceWorker):
        references = [
            TokenValues(sequence_ids=one.sequence_ids, lengths=one.lengths, values=one.rollout_logprobs)
            for one in rollouts
        ]
        worker.prepare(plan, *rollouts, *references)
    elif isinstance(worker, StudentWorker):
        states = _taught(worker, plan, rollouts)
    elif isinstance(worker, StreamedPolicyWorker):
        _stream(worker, plan, rollouts)
    elif isinstance(worker, CriticWorker):
        column, _ = worker.values(plan, *rollouts)
        by_sequence = column.sequence_ids.repeat_interleave(column.lengths)
        worker.prepare(replace(column, values=(by_sequence % 3 - 1).float()))
    else:
        worker.prepare(plan, *rollouts)
        worker.set_advantages({i: 2.0 - (i * 7 % 5) for i in plan.scores})
    return [make_update(worker, 0, *states), make_update(worker, 0, *states)]


def _taught(worker: StudentWorker, plan: BatchPlan, rollouts: list[Rollouts]) -> list[Any]:
    """Prepare a batch for a student, with a teacher that sees. Return the teacher's states, if these are learned."""
    config = worker.config
    options: dict[str, Any] = {"temperature": 1.0, "samples_per_prompt": SAMPLES, "top": top_of(config)}
    options |= {"spans": spans_of(config), "max_tokens_per_microbatch": config.train.max_tokens_per_microbatch}
    teacher = OnlineTeacherWorker(teachers(config), worker.place, **options)
    teacher.start()
    if not worker.algorithm.config.reads_teacher_states:
        worker.prepare(plan, *rollouts, *teacher.logprobs(None, {}, *rollouts)[:-1])
        return []
    worker.take_teacher(ONLY_TEACHER, teacher.head()[0])
    worker.prepare(plan, *rollouts)
    return [*teacher.states([plan.minibatches[0].sequences_by_rank[worker.data_rank]], *rollouts)[:-1]]


def _stream(worker: StreamedPolicyWorker, plan: BatchPlan, rollouts: list[Rollouts]) -> None:
    """Prepare a batch in two portions, and begin the gradient after the first."""
    (whole,) = plan.minibatches
    for portion, part in enumerate((rollouts[: GROUPS // 2], rollouts[GROUPS // 2 :])):
        own = {i for one in part for i in one.sequence_ids.tolist()}
        sequences = tuple(tuple(i for i in ids if i in own) for ids in whole.sequences_by_rank)
        count = sum(int(one.response_mask.sum()) for one in part)
        minibatch = MinibatchPlan(sequences_by_rank=sequences, num_tokens=count, num_sequences=len(own))
        scores = {i: plan.scores[i] for i in own}
        worker.prepare(replace(plan, minibatches=(minibatch,), scores=scores, portion=portion), *part)
        worker.set_advantages({i: 2.0 - (i * 7 % 5) for i in own})
        if not portion:
            worker.forward_backward(0, ends=False)


def _offline(worker: Any, name: str, model: str, folder: Path) -> list[Any]:
    ranks = worker.place.world_size
    examples, sizes = examples_of(model, folder, answers=1 if name in ("sft", "process_reward_model") else 2)
    data: Any = examples
    if name == "process_reward_model":
        at_end = examples.loss_mask & (torch.arange(len(examples.loss_mask)) % 2 == 0)
        columns = {"sequence_ids": examples.sequence_ids, "lengths": examples.lengths, "token_ids": examples.token_ids}
        data = examples = LabelledSteps(**columns, loss_mask=at_end, step_labels=at_end & (examples.token_ids % 3 > 0))
    elif name != "sft":
        prompts = torch.tensor(sizes)
        data = Pairs(
            examples=examples,
            prompt_tokens=prompts,
            margins=torch.zeros(ROWS),
            labels=torch.arange(ROWS) < 2,  # read by KTO alone
        )
    worker.load_data(data)
    count = int(examples.loss_mask.sum())
    plan = MinibatchPlan(sequences_by_rank=of_rank(ROWS, ranks), num_tokens=count, num_sequences=ROWS)
    if isinstance(worker, ReferencedPolicy):
        columns: list[Any] = [None] * ranks
        torch.distributed.all_gather_object(columns, worker.reference_logprobs(0, plan)[0])
        worker.store_reference(0, folder / f"{ranks}.safetensors", *columns)
    return [worker.update_on(plan), worker.update_on(plan)]

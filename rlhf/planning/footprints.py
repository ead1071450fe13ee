"""Apply the memory model of rlhf.planning.memory to every process of a configured run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf.algorithms.privileged import SelfTeaching
from rlhf.config import derive
from rlhf.config.schema.cluster import TrainedResources
from rlhf.config.schema.model import CriticConfig, LoraConfig, ModelConfig, PolicyConfig
from rlhf.config.schema.root import Config
from rlhf.config.transports import TRANSPORTS
from rlhf.objectives.costs import CHUNK_ROWS, multiplies_bfloat16_fast
from rlhf.planning import memory
from rlhf.planning.shapes import Shape, find_shape
from rlhf.role_table import ROLES, Role

BUCKET_BYTES = 64 << 20  # of a weight broadcast: actors.weights.broadcast


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Look up the shapes of a run's models and hold known facts about the machine."""

    shapes: Path | None = None  # --shapes
    made: Mapping[str, str] | None = None  # maps final folders of earlier stages to their original models
    gpu_memory_gib: float | None = None  # of each GPU; None: unknown
    tokens: int | None = None  # of a real micro-batch, if known. None: the configured limit

    def of(self, model: str) -> Shape:
        return find_shape(model, shapes=self.shapes, made=self.made or {})


def footprints(config: Config, sizes: Sizes) -> list[memory.Footprint]:
    """Return the footprint of each role with workers, in placement order. UserError: a model's sizes are unknown."""
    result = []
    for role in derive.derive(config).needs:
        model, kind = derive.ROLE_USES[role].model(config), ROLES[role].kind
        if kind == "engines":
            result.append(_engine(config, sizes))
        elif isinstance(model, PolicyConfig | CriticConfig):
            result.append(_trained(role, model, config, sizes))
        else:
            result.append(_forward(role, model, config, sizes))
    return result


def tokens_of_microbatch(config: Config, role: TrainedResources) -> tuple[int, bool]:
    """Return the tokens of a full micro-batch on a rank, and whether an optimizer step may have several such."""
    budget = config.train.max_tokens_per_microbatch
    rows = -(-config.train.sequences_per_update // role.data_parallel_ranks)
    per_row = 2 if config.algorithm.kind == "sampled_pairs" else derive.sequences_per_row(config)
    most = rows * per_row * derive.derive(config).longest_sequence
    return min(budget, most) // role.sequence_parallel, most > budget


def _itemsize(model: ModelConfig) -> int:
    return 4 if model.dtype == "float32" else 2


def training(role_name: Role, model: PolicyConfig | CriticConfig, config: Config, sizes: Sizes) -> memory.Training:
    shape, role = sizes.of(model.model), getattr(config.cluster.roles, role_name)
    scalar = derive.has_value_head(config, role_name)
    whole = shape.scalar_parameters if scalar else shape.parameters
    lora = model.lora
    sees, tower = model.vision_lr is not None, shape.tower.parameters if model.vision_lr is None else 0
    trained = whole - tower if lora is None else _adapted(shape, lora, vision=sees) + (shape.hidden if scalar else 0)
    tokens, accumulates = tokens_of_microbatch(config, role)
    on_gpu = config.cluster.device == "cuda"
    return memory.Training(
        trained=trained,
        frozen=tower if lora is None else whole,
        frozen_bytes=float(tower * _itemsize(model)) if lora is None else _base_bytes(shape, model, whole),
        itemsize=_itemsize(model),
        zero_stage=role.zero_stage,
        ranks=role.workers,
        tokens=tokens if sizes.tokens is None else sizes.tokens,
        accumulates=accumulates,
        checkpointing=model.gradient_checkpointing,
        lora_rank=None if lora is None else lora.rank,
        trains_tower=model.vision_lr is not None,
        scalar=scalar,
        keeps_head_gradient=config.algorithm.kind in ("supervised", "distillation"),
        optimizer=config.train.optimizer,
        shadow_itemsize=_shadow_itemsize(role_name, model, config),
        offload=role.offload,
        on_gpu=on_gpu,
        widens=not on_gpu and model.dtype == "bfloat16" and not multiplies_bfloat16_fast(),
    )


def _shadow_itemsize(role: Role, model: PolicyConfig | CriticConfig, config: Config) -> int:
    """Return the bytes per weight of a self-teacher's copy of the trained weights. 0: there is no copy."""
    algorithm = config.algorithm
    if role != "policy" or not isinstance(algorithm, SelfTeaching) or algorithm.teacher_weights == "current":
        return 0
    return 4 if algorithm.teacher_weights == "average" else _itemsize(model)


def _self_teacher_terms(config: Config, shape: Shape, how: memory.Training) -> list[memory.Term]:
    """Return the memory of a policy that teaches itself: a copy of the weights, a head, and states of a step."""
    terms = []
    if how.shadow_itemsize:
        by = how.ranks if how.zero_stage == 3 else 1
        terms.append(memory.weights_term("teacher's weights", how.trained, how.shadow_itemsize, by))
    if config.algorithm.distils_rollouts and config.algorithm.reads_teacher_states and config.rollouts is not None:
        terms.append(memory.weights_term("teacher's head", shape.embedding, how.itemsize))
        ranks = config.cluster.roles.policy.data_parallel_ranks
        tokens = -(-derive.responses_per_step(config.rollouts) // ranks) * config.rollouts.max_response_tokens
        says = f"{tokens:,} response tokens of a step * hidden * {how.itemsize} bytes"
        terms.append(memory.Term("teacher's states", tokens * shape.hidden * how.itemsize, says, "host"))
    return terms


def _teacher_heads(config: Config, student: Shape, tokens: int, sizes: Sizes) -> list[memory.Term]:
    """Return the memory of the teachers' vocabulary heads on each rank of the student.

    Over another vocabulary the rank also sorts the probabilities of both models: 40 bytes for each token of a chunk.
    """
    named, terms = derive.has_named_teachers(config), []
    for name, model in derive.teachers(config).items():
        title = f"head of {name}" if named else "teacher's head"
        terms.append(memory.weights_term(title, sizes.of(model.model).embedding, _itemsize(model), stays=True))
    vocabularies = {sizes.of(model.model).vocab for model in derive.teachers(config).values()}
    if others := vocabularies - {student.vocab}:
        rows, entries = min(tokens, CHUNK_ROWS), max(*others, student.vocab)
        says = f"40 bytes for each of {rows} rows of {entries:,} probabilities"
        terms.append(memory.Term("sorted probabilities", 40.0 * rows * entries, says, phase="step"))
    return terms


def _adapted(shape: Shape, lora: LoraConfig, *, vision: bool) -> int:
    """Return the trained parameters of an adapter. Of whole modules, only embedding and head are counted."""
    tables = sum(name.rpartition(".")[2] in ("embed_tokens", "lm_head") for name in lora.modules_to_save)
    whole = min(tables, 1 if shape.tied else 2) * shape.embedding
    return shape.lora_parameters(lora.rank, lora.target_parameters, vision=vision) + whole


def checkpoint_sizes(config: Config, sizes: Sizes) -> Mapping[Role, float]:
    return {
        role: memory.checkpoint_bytes(sizes.of(model.model), training(role, model, config, sizes))
        for role, model in derive.trained_sections(config).items()
    }


def _base_bytes(shape: Shape, model: PolicyConfig | CriticConfig, whole: int) -> float:
    """Return the bytes of the weights under an adapter. `quantize`: 4 bits, and a float32 scale per 64 weights."""
    layers = shape.block_parameters if model.lora is not None and model.lora.quantize is not None else 0
    return layers * (0.5 + 4 / 64) + (whole - layers) * _itemsize(model)


def _trained(name: Role, model: PolicyConfig | CriticConfig, config: Config, sizes: Sizes) -> memory.Footprint:
    shape, how = sizes.of(model.model), training(name, model, config, sizes)
    terms = memory.training_terms(shape, how)
    if name == "policy" and config.algorithm.is_online:
        terms.append(_published(config, shape, how))
    if name == "policy" and isinstance(config.algorithm, SelfTeaching):
        terms += _self_teacher_terms(config, shape, how)
    if name == "policy" and derive.reads_teacher_heads(config):
        terms += _teacher_heads(config, shape, how.tokens, sizes)
    if name in derive.shares_engines_gpus(config):
        terms.append(_put_aside(terms))
    if derive.restarts_gangs(config):
        terms.append(memory.snapshot_term(shape, how))
    process = memory.with_process(terms, process=memory.Measured.TRAINER_BYTES, on_gpu=how.on_gpu, ranks=how.ranks)
    return memory.Footprint(role=name, workers=how.ranks, terms=process, on_gpu=how.on_gpu)


def _put_aside(terms: Sequence[memory.Term]) -> memory.Term:
    """Return the host memory of a role offloaded while an engine uses the GPU."""
    nbytes = sum(term.nbytes for term in terms if term.place == "device" and term.phase == "always")
    return memory.Term("put aside", nbytes, "what the GPU holds between steps, while an engine has the GPU", "host")


def _published(config: Config, shape: Shape, how: memory.Training) -> memory.Term:
    if derive.ships_adapter(config):
        how_sent = "the adapter, copied to be written to the run folder"
        return memory.Term("weight sync", how.trained * how.itemsize, how_sent, "host", first_only=True)
    size = sent_parameters(config, shape) * how.itemsize
    traits = TRANSPORTS[derive.weight_sync(config.cluster, one_host=not config.cluster.address).method]
    if traits.stays:
        return memory.Term("weight sync", size, "all weights in shared memory", "shared")
    if not traits.meets:
        return memory.Term("weight sync", size, "all weights side by side on the GPU", phase="sync")
    bucket, how_sent = max(BUCKET_BYTES, shape.embedding * how.itemsize), "the largest weight, or a bucket of 64 MiB"
    return memory.Term("weight sync", bucket, how_sent, phase="sync", first_only=True)


def sent_parameters(config: Config, shape: Shape) -> int:
    """Return the number of weights in a sync of all weights."""
    return shape.parameters - derive.leaves_tower(config) * shape.tower.parameters


def cache_tokens(config: Config, sizes: Sizes) -> float | None:
    """Return the number of tokens in an engine's KV cache, or None if the GPU memory is unknown."""
    policy = config.policy
    cache = next((term.nbytes for term in _engine(config, sizes).terms if term.name == "KV cache"), None)
    if cache is None:
        return None
    shape = sizes.of(policy.model)
    return cache * _cache_parts(config, shape) / memory.kv_bytes_per_token(shape, itemsize=_itemsize(policy))


def _cache_parts(config: Config, shape: Shape) -> int:
    """Return the number of an engine's GPUs that divide the keys and values. A head is never split."""
    parallel = config.cluster.roles.rollout.tensor_parallel
    return min(parallel, shape.kv_heads) if config.cluster.device == "cuda" else 1


def _engine(config: Config, sizes: Sizes) -> memory.Footprint:
    """Return the footprint of an engine, or of a GPU of an engine with tensor parallelism."""
    policy, role = config.policy, config.cluster.roles.rollout
    shape, size = sizes.of(policy.model), _itemsize(policy)
    on_gpu = config.cluster.device == "cuda"
    terms = memory.engine_terms(
        shape, itemsize=size, tensor_parallel=role.tensor_parallel, max_num_seqs=role.max_num_seqs, on_gpu=on_gpu
    )
    each = memory.kv_bytes_per_token(shape, itemsize=size) / _cache_parts(config, shape)
    if not on_gpu:
        cache: float | None = role.kv_cache_gib * memory.GIB
    elif sizes.gpu_memory_gib is None:
        cache = None
    else:
        cache = role.gpu_memory_utilization * sizes.gpu_memory_gib * memory.GIB - sum(term.nbytes for term in terms)
    if cache is not None:
        longest = derive.derive(config).longest_sequence
        fits = max(cache, 0.0) / each
        how = f"{each / 1024:,.0f} KiB a token: {fits:,.0f} tokens, {fits / longest:,.1f} sequences of {longest:,}"
        terms.append(memory.Term("KV cache", max(cache, 0.0), how, phase="step", in_heap=False))
    if not on_gpu and not derive.ships_adapter(config) and config.cluster.address is None:
        terms.append(
            memory.Term("weight sync", sent_parameters(config, shape) * size, "the policy's file, mapped", "shared")
        )
    process = memory.with_process(terms, process=memory.Measured.ENGINE_BYTES, on_gpu=on_gpu)
    return memory.Footprint(role="rollout", workers=role.workers * role.tensor_parallel, terms=process, on_gpu=on_gpu)


def _forward(name: Role, model: ModelConfig | None, config: Config, sizes: Sizes) -> memory.Footprint:
    """Return the footprint of a worker with a frozen model, or with reward functions only if `model` is None."""
    on_gpu = config.cluster.device == "cuda" and model is not None
    is_scoring = ROLES[name].kind == "scoring"
    held = derive.held_models(config, name)
    others = list(held.items())[1:]
    if not is_scoring and others:  # teachers take turns on a GPU, and each then has a copy in host memory
        model = max(held.values(), key=lambda one: sizes.of(one.model).parameters * _itemsize(one))
        leaves = on_gpu and name not in derive.shares_engines_gpus(config)  # else counted by _put_aside
        others = [(key, one) for key, one in held.items() if leaves or one is not model]
    base = memory.Measured.REWARD_BYTES if is_scoring else memory.Measured.FORWARD_BYTES
    terms: list[memory.Term] = []
    if model is not None:
        terms = memory.forward_terms(
            sizes.of(model.model),
            itemsize=_itemsize(model),
            tokens=config.train.max_tokens_per_microbatch if sizes.tokens is None else sizes.tokens,
            scalar=is_scoring,
            widens=not on_gpu and model.dtype == "bfloat16" and not multiplies_bfloat16_fast(),
        )
    place: memory.Place = "device" if is_scoring else "host"
    for key, one in others:  # the models compute in turns, so the activations are those of one model
        shape, of = sizes.of(one.model), key.removesuffix(".model").removeprefix("members.")
        count = shape.scalar_parameters if is_scoring else shape.parameters
        terms.append(memory.weights_term(f"weights of {of}", count, _itemsize(one), place=place, in_heap=False))
    if name in derive.shares_engines_gpus(config):
        terms.append(_put_aside(terms))
    if is_scoring:
        vocab, each = sizes.of(config.policy.model).vocab, memory.Measured.TOKENIZER_BYTES
        terms.append(memory.Term("tokenizer", vocab * each, f"measured: {vocab:,} * {each} bytes", "host"))
    workers = getattr(config.cluster.roles, name).workers
    return memory.Footprint(
        role=name, workers=workers, terms=memory.with_process(terms, process=base, on_gpu=on_gpu), on_gpu=on_gpu
    )

"""Estimate the memory of one process of each role, term by term, as allocated by this code base.

Sizes follow from the model's shape, DeepSpeed's buffers (rlhf.engine.deepspeed), the packed forward pass
(rlhf.models.packed.forward) and the chunked head (rlhf.objectives.logprobs). Five numbers are measured (see
`Measured`). Micro-batches are taken as full, so the result is an upper bound for runs with short responses. GPU terms
follow the same rules but were never measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from rlhf.objectives.costs import CHUNK_ROWS, CHUNKS_PER_PRODUCT
from rlhf.planning.shapes import Shape
from rlhf.role_table import Role

GIB = 2**30
PREFILL_TOKENS = 8192  # as in actors.rollout.vllm_engine
BUCKET_ELEMENTS = 5 * 10**7  # as in rlhf.engine.deepspeed; a test compares both
SNAPSHOTS = "snapshots"  # name of the snapshots' term
LIVE_PARAMETERS = 10**9  # of ZeRO-3: gathered and not yet released; DeepSpeed's default

Place = Literal["device", "host", "shared"]  # shared: resident in each process, but only once in the node's memory
Phase = Literal["always", "step", "sync"]  # held also between passes, during passes, or during a weight transfer


class Measured:
    """Hold constants measured by benchmarks/plan_memory.py on two CPU cores (docs/scaling.md).

    Process sizes are for an idle worker after all imports. HEAP is the resident heap of a worker divided by the peak
    bytes of the tensors: the allocator keeps freed blocks, and later blocks never fit exactly.
    """

    TRAINER_BYTES = int(0.68 * GIB)
    FORWARD_BYTES = int(0.64 * GIB)
    REWARD_BYTES = int(0.61 * GIB)
    TOKENIZER_BYTES = 1450  # per vocabulary entry, in a reward worker; other processes were measured with a tokenizer
    ENGINE_BYTES = int(0.84 * GIB)
    HEAP = 1.26


class Assumed:
    """Hold customary sizes of a process on a GPU before the first tensor, without a measurement here.

    CUDA: context, cuBLAS' workspace, kernels. NCCL: buffers of a gang of ranks; an engine's are in the engine's share.
    """

    CUDA_BYTES = int(0.75 * GIB)
    NCCL_BYTES = int(1.0 * GIB)


@dataclass(frozen=True, slots=True)
class Term:
    name: str
    nbytes: float
    how: str  # the arithmetic
    place: Place = "device"
    phase: Phase = "always"
    stays: bool = False  # the term stays on the device even while the role is offloaded
    first_only: bool = False  # only the first rank of a gang has the term
    in_heap: bool = True  # False: one block, or pages of a file


def weights_term(name: str, count: float, itemsize: int, by: int = 1, note: str = "", **options: Any) -> Term:
    """Return the memory of `count` values, divided by a number of ranks. options: other fields of Term."""
    how = f"{_short(count)} * {itemsize} bytes" + ("" if by == 1 else f" / {by}") + note
    return Term(name, count * itemsize / by, how, **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Describe the peak of one process of a role, or of one GPU of an engine. If processes differ, the first counts."""

    role: Role
    workers: int
    terms: tuple[Term, ...]
    on_gpu: bool

    def of(self, place: Place) -> float:
        """Return the bytes of the terms at a place. Passes and weight transfers of a device do not overlap."""
        if place == "device":
            return self.held("always") + max(self.held("step"), self.held("sync"))
        return sum(term.nbytes for term in self.terms if term.place == place)

    def held(self, phase: Phase) -> float:
        """Return the bytes of the device's terms of one phase."""
        return sum(term.nbytes for term in self.terms if term.place == "device" and term.phase == phase)

    @property
    def stays(self) -> float:
        """Return the bytes left on the device while the role is offloaded."""
        return sum(term.nbytes for term in self.terms if term.stays)

    def private(self, workers: int) -> float:
        """Return the host memory of `workers` processes including the first, without shared memory."""
        terms = [term for term in self.terms if term.place == "host" or (term.place == "device" and not self.on_gpu)]
        return sum(term.nbytes * (1 if term.first_only else workers) for term in terms)

    @property
    def rss(self) -> float:
        """Return the peak resident set of the process. On a GPU, device memory is excluded."""
        return self.of("host") + self.of("shared") + (0.0 if self.on_gpu else self.of("device"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    trained: int  # parameters
    frozen: int
    frozen_bytes: float  # of the base: in its dtype, or 4 bits per weight and a scale per 64
    itemsize: int  # bytes per weight
    zero_stage: int
    ranks: int
    tokens: int  # of one full micro-batch, on this rank
    accumulates: bool  # whether an optimizer step has several micro-batches
    checkpointing: bool
    lora_rank: int | None
    trains_tower: bool = False  # of a model that sees
    scalar: bool  # a scalar head instead of a vocabulary head
    keeps_head_gradient: bool  # the head's gradient is computed in the forward pass (supervised runs)
    optimizer: str  # train.optimizer
    shadow_itemsize: int = 0  # bytes per weight of a self-teacher's copy of the trained weights; 0: there is no copy
    offload: tuple[str, ...]
    on_gpu: bool
    widens: bool  # products of bfloat16 are taken in float32 (rlhf.objectives.products)

    def place(self, part: str) -> Place:
        """Return the place of the optimizer or the parameters. A GPU may offload both."""
        return "host" if self.on_gpu and part in self.offload else "device"


def activation_bytes(shape: Shape, *, itemsize: int, checkpointing: bool, lora_rank: int | None) -> float:
    """Return the bytes saved by all layers for the backward pass, per token of a micro-batch.

    A layer saves, for each of two norms, the input in float32, the scaled row and the output (4 + 2b bytes an element).
    Attention saves query, key, value, the result and the input of the output projection (3Q + 2K elements). The MLP
    saves gate, activated gate, up, and the product. With checkpointing, one layer at a time has all rows.
    """
    norms = 2 * (4 + 2 * itemsize) * shape.hidden
    attention = (3 * shape.query + 2 * shape.key) * itemsize
    if shape.qk_norm:
        attention += (4 + itemsize) * (shape.query + shape.key)
    layer = norms + attention + 4 * shape.widest_mlp * itemsize + (7 * lora_rank * itemsize if lora_rank else 0)
    return shape.layers * shape.hidden * itemsize + layer if checkpointing else shape.layers * layer


def tower_bytes(shape: Shape, *, itemsize: int, checkpointing: bool, trained: bool) -> float:
    """Return the bytes held for the passes of a vision tower, per token of an image.

    The terms are those of `activation_bytes`, with heads as wide as the tower, for each patch of the token. A frozen
    tower has the rows of one layer at a time.
    """
    tower = shape.tower
    layer = 2 * (4 + 2 * itemsize) * tower.hidden + 5 * tower.hidden * itemsize + 4 * tower.ffn * itemsize
    if not trained:
        return tower.patches * layer
    kept = tower.layers * tower.hidden * itemsize + layer if checkpointing else tower.layers * layer
    return tower.patches * kept


def head_bytes(shape: Shape, *, rows: int, itemsize: int, trains_head: bool, widens: bool) -> float:
    """Return the bytes of the vocabulary head in the backward pass of `rows` rows.

    The bytes are three chunks of 256 rows of logits in float32, the logit gradients of four chunks, and the gradient of
    the head's weight. With more rows, the weight gradient is a float32 sum plus a separate product.
    """
    wide = 4 if widens else itemsize
    chunk, block = min(rows, CHUNK_ROWS), min(rows, CHUNK_ROWS * CHUNKS_PER_PRODUCT)
    nbytes: float = 3 * chunk * shape.vocab * 4 + block * shape.vocab * wide
    if trains_head:
        nbytes += shape.embedding * (wide if rows <= block else 4 + wide)
    return nbytes + (shape.embedding * 4 if widens else 0)


def training_terms(shape: Shape, t: Training) -> list[Term]:
    """Return the permanent terms of one rank, and the terms of the largest peak.

    The first peak is the start of the backward pass: all activations, the head, the gradient bucket. The second is the
    end of the backward pass: the bucket twice, since gradients are reduced in a copy. Stage 3 also peaks in the
    optimizer step, where the gradients become one block, in host memory with optimizer offload. The heap has freed the
    activations by then, but has no free block of this size. The pass of a frozen vision tower, before all else, is a
    peak too: at most all tokens are of images.
    """
    bucket, summed = _bucket(t), _summed_gradients(t)
    first = [*bucket, _activations(shape, t), *([] if t.scalar else [_head(shape, t)])]
    tower = [_tower(shape, t)] if shape.tower.parameters else []
    first += tower if t.trains_tower else []
    if t.accumulates or t.zero_stage in (0, 3):
        first.append(summed)
    last, step = [*bucket, summed], [*bucket, summed]
    if t.zero_stage in (1, 2):
        size = t.itemsize * min(t.trained, BUCKET_ELEMENTS)
        last.append(Term("gradients in reduction", size, "as the bucket", phase="step"))
        if t.trained > shape.largest_weight:
            name = "vocabulary * hidden" if shape.largest_weight == shape.embedding else "a layer's experts"
            last.append(Term("largest gradient", 4 * shape.largest_weight, f"{name} * 4 bytes", phase="step"))
    if t.zero_stage == 0 and t.itemsize == 2:  # DeepSpeed copies all gradients
        step.append(weights_term("gradients in float32", t.trained, 4, phase="step"))
    if t.zero_stage == 3:  # the block that the optimizer step uses
        block = weights_term("gradients as a block", t.trained, 4, t.ranks, place=t.place("optimizer"), phase="step")
        step.append(block)
        if block.place == "host" or not t.on_gpu:  # it exists from the start, or beside free blocks too small for it
            first.append(block)
    peaks = (first, last, step, [*bucket, *tower])
    return [*_states(shape, t), *max(peaks, key=lambda terms: sum(term.nbytes for term in terms))]


def _states(shape: Shape, t: Training) -> list[Term]:
    by, weights_by = t.ranks if t.zero_stage >= 1 else 1, t.ranks if t.zero_stage == 3 else 1
    note = ", the base in 4 bits" if t.frozen_bytes < t.frozen * t.itemsize else ""
    weights = weights_term("weights", t.trained + t.frozen, t.itemsize, weights_by, note, place=t.place("parameters"))
    terms = [replace(weights, nbytes=(t.trained * t.itemsize + t.frozen_bytes) / weights_by)]
    optimizer = t.place("optimizer")
    if t.zero_stage >= 1 or t.itemsize == 2:
        terms.append(weights_term("master weights", t.trained, 4, by, place=optimizer))
    terms.append(_optimizer_states(shape, t, by=by, place=optimizer))
    if t.zero_stage == 3 and t.ranks > 1:
        gathered = max(min(t.trained + t.frozen, LIVE_PARAMETERS), shape.layer_experts)
        terms.append(weights_term("weights gathered", gathered, t.itemsize))
    return terms


def snapshot_term(shape: Shape, t: Training) -> Term:
    """Return the shared memory of one rank for two snapshots (rlhf.engine.snapshots)."""
    by = t.ranks if t.zero_stage >= 1 else 1
    shadows = t.shadow_itemsize * t.trained / (t.ranks if t.zero_stage == 3 else 1)
    nbytes = 2 * (4.0 * t.trained / by + _optimizer_states(shape, t, by=by, place="host").nbytes + shadows)
    return Term(SNAPSHOTS, nbytes, "weights in float32 and the optimizer's states, twice, in /dev/shm", "host")


def snapshot_sizes(processes: Sequence[Footprint]) -> dict[Role, int]:
    """Return the bytes of the snapshots of one rank, by role. A role without snapshots is left out."""
    terms = [(process.role, term) for process in processes for term in process.terms]
    return {role: int(term.nbytes) for role, term in terms if term.name == SNAPSHOTS}


def checkpoint_bytes(shape: Shape, t: Training) -> float:
    """Return the size of a checkpoint of all ranks: weights in float32, the optimizer's states, a teacher's copies."""
    return t.trained * (4.0 + t.shadow_itemsize) + _optimizer_states(shape, t, by=1, place="host").nbytes


def _optimizer_states(shape: Shape, t: Training, *, by: int, place: Place) -> Term:
    if t.optimizer == "adamw_8bit":
        moments = weights_term("8-bit moments", t.trained, 2, by, ", and two scales for each 256", place=place)
        return replace(moments, nbytes=t.trained * (2 + 8 / 256) / by)
    if t.optimizer == "muon":
        matrices = t.trained if t.lora_rank is not None else shape.matrix_parameters
        momentum = weights_term("Muon momentum", matrices, 4, 1, ", and 8 bytes of each other weight", place=place)
        return replace(momentum, nbytes=4.0 * matrices + 8 * (t.trained - matrices))
    if t.optimizer == "adafactor":
        count = shape.factored(lora_rank=t.lora_rank, scalar=t.scalar)
        return weights_term("Adafactor states", count, 4, 1, ": a row and a column of each matrix", place=place)
    return weights_term("Adam moments", t.trained, 8, by, place=place)


def _summed_gradients(t: Training) -> Term:
    """Return the gradient sums over the micro-batches so far. Stage 3 keeps their block between steps."""
    if t.zero_stage == 0:
        return weights_term("gradients", t.trained, t.itemsize, phase="step")
    by, phase = t.ranks if t.zero_stage in (2, 3) else 1, "always" if t.zero_stage == 3 else "step"
    return weights_term("summed gradients", t.trained, 4, by, place=t.place("optimizer"), phase=phase)


def _bucket(t: Training) -> list[Term]:
    """Return DeepSpeed's buffer of gradients to be reduced: two on GPUs, where reduction overlaps."""
    if t.zero_stage == 0:
        return []
    count, phase = 2 if t.on_gpu and t.zero_stage < 3 else 1, "always" if t.zero_stage == 3 else "step"
    size = min(t.trained, BUCKET_ELEMENTS)
    return [weights_term("gradient bucket", size, t.itemsize * count, phase=phase)]


def _activations(shape: Shape, t: Training) -> Term:
    each = activation_bytes(shape, itemsize=t.itemsize, checkpointing=t.checkpointing, lora_rank=t.lora_rank)
    how = f"{t.tokens:,} tokens * {each / 1024:,.0f} KiB" + (", checkpointed" if t.checkpointing else "")
    return Term("activations", t.tokens * each, how, phase="step")


def _tower(shape: Shape, t: Training) -> Term:
    each = tower_bytes(shape, itemsize=t.itemsize, checkpointing=t.checkpointing, trained=t.trains_tower)
    how = f"{t.tokens:,} tokens of images * {each / 1024:,.0f} KiB"
    return Term("vision tower", t.tokens * each, how, phase="step")


def _head(shape: Shape, t: Training) -> Term:
    trains = t.lora_rank is None
    if t.keeps_head_gradient:  # the logits are freed before the bucket is allocated
        return weights_term("head's gradient", shape.embedding if trains else 0, t.itemsize, phase="step")
    size = head_bytes(shape, rows=t.tokens, itemsize=t.itemsize, trains_head=trains, widens=t.widens)
    return Term("vocabulary head", size, _chunks(shape), phase="step")


def _chunks(shape: Shape) -> str:
    return f"chunks of {CHUNK_ROWS} rows of {shape.vocab:,} logits"


def forward_terms(shape: Shape, *, itemsize: int, tokens: int, scalar: bool, widens: bool) -> list[Term]:
    """Return the terms of a frozen model: weights, one layer's rows, and a chunk of logits."""
    count = shape.scalar_parameters if scalar else shape.parameters
    rows = tokens * itemsize * (4 * shape.hidden + 3 * shape.widest_mlp + 2 * shape.query)
    tower = tokens * tower_bytes(shape, itemsize=itemsize, checkpointing=False, trained=False)
    terms = [
        weights_term("weights", count, itemsize, in_heap=False),
        Term("activations", max(rows, tower), f"{tokens:,} tokens of one layer", phase="step"),
    ]
    if not scalar:
        each = (4 if widens else itemsize) + 4 + 4  # the product, the logits, and the input of their sum
        size = min(tokens, CHUNK_ROWS) * shape.vocab * each + (shape.embedding * 4 if widens else 0)
        terms.append(Term("vocabulary head", size, _chunks(shape), phase="step"))
    return terms


def engine_terms(shape: Shape, *, itemsize: int, tensor_parallel: int, max_num_seqs: int, on_gpu: bool) -> list[Term]:
    """Return the terms of vLLM without the cache: weights in kernel layout, and the work of the largest step."""
    logits = 4 * max_num_seqs * shape.vocab * 4
    rows = PREFILL_TOKENS * itemsize * (3 * shape.widest_mlp + 2 * shape.hidden) / tensor_parallel
    return [
        weights_term("weights", shape.parameters, itemsize, tensor_parallel),
        *([] if on_gpu else [weights_term("packed head", shape.embedding, itemsize)]),
        Term("largest prefill", rows, f"{PREFILL_TOKENS:,} tokens of one layer", phase="step"),
        Term("sampling", logits, f"4 * {max_num_seqs} rows of {shape.vocab:,} logits", phase="step"),
    ]


def kv_bytes_per_token(shape: Shape, *, itemsize: int) -> int:
    """Return the bytes of keys and values in all layers for a token."""
    return 2 * shape.layers * shape.key * itemsize


def with_process(terms: Sequence[Term], *, process: int, on_gpu: bool, ranks: int = 1) -> tuple[Term, ...]:
    """Return the terms plus the process itself and, on a CPU, the extra memory of the heap.

    ranks: the size of a gang communicating by NCCL.
    """
    result = [*terms, Term("process", process, "measured: libraries and interpreter", "host")]
    if on_gpu:
        nbytes = Assumed.CUDA_BYTES + (Assumed.NCCL_BYTES if ranks > 1 else 0)
        name = "CUDA and NCCL" if ranks > 1 else "CUDA"
        result.append(Term(name, nbytes, "assumed: context, workspaces, buffers", stays=True))
    else:
        heap = sum(term.nbytes for term in terms if term.place == "device" and term.in_heap)
        slack = Measured.HEAP - 1.0
        result.append(Term("heap", slack * heap, f"measured: {slack:.0%} of tensors"))
    return tuple(result)


def _short(count: float) -> str:
    units = ((1e9, "B"), (1e6, "M"), (1e3, "k"))
    return next((f"{count / limit:.4g}{unit}" for limit, unit in units if count >= limit), f"{count:.0f}")

"""Base of the policy's and the critic's ranks: the gang, the engine, optimizer steps, checkpoints and export."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from rlhf.algorithms import algorithm_of
from rlhf.algorithms.algorithm import Algorithm
from rlhf.config.derive import updates_per_step, warmup_steps
from rlhf.config.schema.cluster import TrainedResources
from rlhf.config.schema.model import CriticConfig, PolicyConfig
from rlhf.config.schema.rollouts import RolloutsConfig
from rlhf.config.schema.root import Config
from rlhf.engine.distributed import RankContext, init_distributed, leave_distributed
from rlhf.engine.flops import flops_per_token, measure_peak_flops
from rlhf.engine.sharded_loading import shards_as_it_loads
from rlhf.engine.snapshot_copies import CopyPlace
from rlhf.engine.training_engine import OptimizerSettings, ScheduleSettings, TrainingEngine
from rlhf.models.files.loading import architecture_fingerprint, load_causal_lm
from rlhf.models.packed.forward import policy_logprobs_only
from rlhf.models.packed.images import open_images
from rlhf.models.packed.rope import fix_frequencies
from rlhf.models.packed.row_check import check_rows
from rlhf.models.packed.row_layout import row_layout
from rlhf.models.routers.recording import RoutingRecord, routers_of
from rlhf.roles import Arithmetic, Metrics
from rlhf.tracking.metrics.declarations import merge_metrics
from rlhf.tracking.metrics.reductions import ExpertEntropy, ExpertLoad, Last, Mean
from rlhf.workers.microbatches import Microbatch, SharedPrefixes, padded, split_microbatches
from rlhf.workers.model_worker import ModelWorker, torch_dtype
from rlhf.workers.trained_model import (
    load_policy_tokenizer,
    load_trained_model,
    write_model_folder,
)

Measure = Callable[[], Metrics]


class TrainedWorker(ModelWorker):
    """One rank of a gang. `start` joins the gang; every other method is called on all ranks, in the same order.

    Ranks sharing micro-batches return equal results, so callers use the first rank's results.
    """

    step_metric: ClassVar[str] = "update/{}"  # names of the gradient norm and the learning rate
    load_model: ClassVar[Callable[..., Any]] = staticmethod(load_causal_lm)
    family: ClassVar[type[Algorithm]]  # class of the algorithms known to the worker
    engine: TrainingEngine
    divisor: float | None = None  # divides the gradient at the next optimizer step; None: no gradient

    def __init__(
        self,
        config: Config,
        place: RankContext,
        *,
        optimizer_steps: int,
        model: CriticConfig | None = None,
    ) -> None:
        """Store the settings of the role. Without `model`, the policy's section applies."""
        super().__init__(place)
        self.config = config
        self.algorithm: Any = algorithm_of(config.algorithm, self.family)
        self.model_config: PolicyConfig | CriticConfig = config.policy if model is None else model
        self.resources: TrainedResources = getattr(config.cluster.roles, self.role)
        self.lr = config.train.lr
        self.optimizer_steps = optimizer_steps
        self.data_rank = place.rank // self.resources.sequence_parallel  # index of this rank's share of a batch
        torch.manual_seed(config.run.seed + place.rank)

    @property
    def contributes(self) -> bool:
        """Return whether this rank adds its share to a sum over ranks. Of ranks with the same share, the first adds."""
        return self.place.rank % self.resources.sequence_parallel == 0

    @property
    def rollouts_config(self) -> RolloutsConfig:
        """Return the section of an online run."""
        assert self.config.rollouts is not None
        return self.config.rollouts

    def start(self, master_addr: str, master_port: int) -> str:
        """Join the gang and load the model. Return the architecture's fingerprint."""
        init_distributed(self.place, master_addr, master_port)
        return self.build()

    def build(self) -> str:
        """Load the model and wrap the model for training. The process must have joined the gang."""
        from rlhf.engine.deepspeed import DeepSpeedEngine  # importing DeepSpeed chooses the device

        with self.explaining("start"):
            dtype = torch_dtype(self.model_config.dtype)
            offload = frozenset(self.resources.offload)
            module = self.load_module()
            open_images(module, self.place.images)
            if self.place.longest_sequence is not None:
                fix_frequencies(module, self.place.longest_sequence)
            self.fingerprint = architecture_fingerprint(module.config)
            self.engine = DeepSpeedEngine(
                module,
                optimizer=self._optimizer(),
                schedule=self._schedule(),
                zero_stage=self.resources.zero_stage,
                offload=offload,
                dtype=dtype,
                device=self.device,
                deadline_s=self.place.deadline_s,
                sequence_parallel=self.resources.sequence_parallel,
            )
            with torch.no_grad():
                self.engine.forward(check_rows, self.device)  # after sharding: all ranks run the same passes
            self.layout = row_layout(module)
        self.tokenizer: Any = load_policy_tokenizer(self.config)
        return self.fingerprint

    def _optimizer(self) -> OptimizerSettings:
        train, lora = self.config.train, self.model_config.lora
        return OptimizerSettings(
            name=train.optimizer,
            lr=self.lr,
            betas=train.betas,
            eps=train.eps,
            weight_decay=train.weight_decay,
            grad_clip=train.grad_clip,
            lora_plus_ratio=1.0 if lora is None else lora.lora_plus_ratio,
            vision_ratio=(self.model_config.vision_lr or self.lr) / self.lr,
        )

    def _schedule(self) -> ScheduleSettings:
        train = self.config.train
        return ScheduleSettings(
            kind=train.lr_schedule,
            warmup_steps=warmup_steps(train, self.optimizer_steps),
            total_steps=self.optimizer_steps,
            updates_per_step=updates_per_step(self.config),
            min_ratio=train.min_lr_ratio,
            cycles=train.lr_cycles,
            decay_ratio=train.lr_decay_ratio,
        )

    def adapter_off(self) -> AbstractContextManager[None]:
        """Compute the passes of the block with the model before training: the base of the LoRA policy."""
        from rlhf.models.adapters.lora import adapter_disabled  # with peft, which takes seconds

        return adapter_disabled(self.engine.module)

    def load_module(self) -> Any:
        """Load the model before training. At ZeRO stage 3 each rank has a part of each weight. Collective."""
        with shards_as_it_loads(
            zero_stage=self.resources.zero_stage,
            dtype=torch_dtype(self.model_config.dtype),
            offload_parameters=self.device.type == "cuda" and "parameters" in self.resources.offload,
        ):
            return load_trained_model(self.model_config, type(self).load_model, self.device)

    def split(
        self,
        lengths: Int[Tensor, " B"],
        rows: Sequence[int],
        prefixes: SharedPrefixes | None = None,
        *,
        padding: int = 1,
    ) -> tuple[Microbatch, ...]:
        """Split the given rows into micro-batches, as many as on the rank with the most. Collective.

        An empty micro-batch has `padding` sequences.
        """
        budget, sizes = self.config.train.max_tokens_per_microbatch, lengths.tolist()
        microbatches = split_microbatches(sizes, rows, max_tokens=budget, prefixes=prefixes, layout=self.layout)
        return tuple(padded(microbatches, self.engine.max_over_ranks(len(microbatches)), sequences=padding))

    def whole_gradient(
        self, microbatches: Sequence[Microbatch], compute: Callable[[Microbatch], tuple[Tensor, Measure]]
    ) -> Metrics:
        """Compute the gradient of an optimizer step: of the sum of the micro-batches' losses. Collective."""
        metrics = merge_metrics(self.accumulate_gradient(microbatches, compute, ends=True))
        self.divisor = 1.0
        return metrics

    def optim_step(self) -> Metrics:
        """Update the weights by the computed gradient. Without a trained token there is no step, and weights and
        schedule stay the same. Return the metrics of the step. Collective."""
        divisor, self.divisor = self.divisor, None
        return {} if divisor is None else self.step_optimizer(divisor)

    def accumulate_gradient(
        self, microbatches: Sequence[Microbatch], compute: Callable[[Microbatch], tuple[Tensor, Measure]], *, ends: bool
    ) -> list[Metrics]:
        """Add the gradient of the micro-batches' losses to the gradient of the optimizer step. Collective.

        Returns the metrics of each micro-batch. `compute` returns a micro-batch's share of the step's loss, and a
        function for the metrics. The metrics are read after the backward pass, since reading makes a GPU wait. `ends`:
        whether the last micro-batch is also the optimizer step's last.
        """
        parts: list[Metrics] = []
        routers, balance_coef = routers_of(self.engine.module), self.model_config.router_balance_coef
        if balance_coef:  # the sequences of the step on all ranks
            count = sum(len(microbatch.rows) for microbatch in microbatches) if self.contributes else 0
            num_sequences = int(self.engine.all_reduce_sum(torch.tensor(count, device=self.device)))
        for index, microbatch in enumerate(microbatches):
            with self.explaining("update", microbatch):
                routing = RoutingRecord(microbatch.lengths, microbatch.branches)
                with routing.of(routers, in_order=balance_coef > 0.0):
                    loss, measure = compute(microbatch)
                balance = routing.balance_loss() if balance_coef and microbatch.rows else None
                if balance is not None:
                    loss = loss + balance_coef / num_sequences * balance
                self.engine.backward(loss, last=ends and index == len(microbatches) - 1)
            if microbatch.rows:
                parts.append(measure())
                if routers:
                    parts.append(self._routing_metrics(routing, balance, len(microbatch.rows)))
        return parts

    def _routing_metrics(self, routing: RoutingRecord, balance: Tensor | None, num_sequences: int) -> Metrics:
        loads = routing.loads()
        metrics: Metrics = {"router_load": ExpertLoad(layers=loads), "router_entropy": ExpertEntropy(layers=loads)}
        if balance is not None:
            metrics = {**metrics, "router_balance_loss": Mean(total=float(balance.detach()), count=num_sequences)}
        return {self.step_metric.format(name): value for name, value in metrics.items()}

    def step_optimizer(self, divisor: float = 1.0) -> Metrics:
        """Update the weights by the gradient divided by `divisor`. Return the metrics of the step. Collective."""
        report = self.engine.step(divisor)
        if self.place.rank != 0:
            return {}
        norm, rate = (self.step_metric.format(name) for name in ("grad_norm", "lr"))
        norms = {norm: Mean.of([report.grad_norm])} if math.isfinite(report.grad_norm) else {}
        return {**norms, rate: Last(value=report.lr)}

    def probe(self, token_ids: Sequence[int]) -> list[float]:
        """Return the log-probabilities of token_ids[1:] at temperature 1, except at images' positions. Collective."""
        ids = torch.tensor(list(token_ids), device=self.device)
        mask = ids >= 0
        mask[0] = False
        with torch.no_grad():
            lengths = torch.tensor([len(ids)], device=self.device)
            logprobs = self.engine.forward(policy_logprobs_only, ids, lengths, mask=mask)
        result: list[float] = logprobs[mask].float().tolist()
        return result

    def weights(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield the saved weights: only the adapter for LoRA, otherwise all weights. Collective."""
        if self.model_config.lora is not None:
            return self.engine.named_adapter_weights(dtype)
        return self.engine.named_weights(dtype)

    def save(self, folder: Path) -> None:
        self.engine.save(folder)

    def load(self, folder: Path) -> None:
        self.engine.load(folder)

    def open_snapshots(self, folder: Path, copies: CopyPlace | None = None) -> None:
        self.engine.open_snapshots(folder, copies)

    def send_snapshots_to(self, place: CopyPlace | None) -> None:
        self.engine.send_snapshots_to(place)

    def take_snapshot(self, step: int) -> str | None:
        return self.engine.take_snapshot(step)

    def newest_snapshot(self) -> int | None:
        return self.engine.newest_snapshot()

    def restore_snapshot(self, step: int) -> None:
        self.engine.restore_snapshot(step)

    def export(self, folder: Path) -> None:
        """Write a Hugging Face folder (an adapter folder for LoRA). Rank 0 writes, all ranks gather. Collective."""
        dtype = torch_dtype(self.model_config.dtype)
        weights, alone = self.weights(dtype), self.model_config.lora is not None
        if self.place.rank == 0:
            write_model_folder(folder, weights, self.engine.module, self.tokenizer, dtype=dtype, adapter_alone=alone)
        for _ in weights:  # on further ranks
            pass

    def arithmetic(self) -> Arithmetic:
        """Return the model's FLOPs per token and the measured peak FLOPs of this rank."""
        config = self.engine.module.config
        fixed = flops_per_token(config, 0.0)
        side = 4096 if self.device.type == "cuda" else 1536  # a fraction of a second on both
        peak = measure_peak_flops(torch_dtype(self.model_config.dtype), self.device, side=side)
        return Arithmetic(
            flops_per_token=fixed,
            flops_per_token_and_length=flops_per_token(config, 1.0) - fixed,
            peak_flops=peak,
        )

    def offload(self) -> None:
        self.engine.offload_to_host()

    def reload(self) -> None:
        self.engine.reload_to_device()

    def empty_cache(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def stop(self) -> None:
        """Leave the gang, so that the process can end or join a new gang."""
        leave_distributed()

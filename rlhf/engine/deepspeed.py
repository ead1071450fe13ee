"""The training engine on DeepSpeed: ZeRO 0-3 in float32, or bfloat16 with float32 master weights.

Each rank has one instance, made after `init_distributed`. DeepSpeed averages gradients over ranks. Losses here are
shares of a sum, so `backward` undoes the average. Ranks sharing micro-batches (sequence_parallel) evaluate the same
loss, each for the part of the gradient flowing through the rank's tokens. No op is compiled at run time: the optimizers
come from rlhf.engine.optimizers, not from DeepSpeed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf.adapters import AdamStep
from rlhf.engine.distributed import set_deadline
from rlhf.engine.engine_record import EngineRecord
from rlhf.engine.frozen_weights import digest_of_base, digest_over_ranks
from rlhf.engine.gathering import whole_numel, whole_weights
from rlhf.engine.optimizers import make_optimizer
from rlhf.engine.parameter_groups import parameter_groups
from rlhf.engine.partitions import SUB_GROUP_ELEMENTS, TENANT_STAGES
from rlhf.engine.rank_files import write_rank
from rlhf.engine.rank_state import RankState
from rlhf.engine.resharding import take_over
from rlhf.engine.schedule import lr_factor
from rlhf.engine.shadow_weights import ShadowWeights
from rlhf.engine.snapshot_copies import CopyPlace, fetch_copies, steps_in
from rlhf.engine.snapshots import Snapshots
from rlhf.engine.swapping import Swapping
from rlhf.engine.training_engine import OptimizerSettings, ScheduleSettings, StepReport
from rlhf.errors import RunError, UserError
from rlhf.models.files.loading import architecture_fingerprint
from rlhf.models.files.weights import adapter_sources, sources_without_tower, weight_sources
from rlhf.models.packed.row_layout import refuse_uneven_heads
from rlhf.models.packed.sequence_parallel import make_group, rows_shared_by
from rlhf.tracking.run_folder.atomic import make_folder

P = ParamSpec("P")
T = TypeVar("T")
Offload = frozenset[Literal["optimizer", "parameters"]]

logger = logging.getLogger(__name__)
BUCKET_ELEMENTS = 5 * 10**7  # bytes of gradients reduced at once, in up to three copies


class DeepSpeedEngine:
    """Implements rlhf.engine.training_engine.TrainingEngine with DeepSpeed."""

    def __init__(
        self,
        module: Any,
        *,
        optimizer: OptimizerSettings,
        schedule: ScheduleSettings,
        zero_stage: Literal[0, 1, 2, 3],
        dtype: torch.dtype,
        device: torch.device,
        deadline_s: float,
        offload: Offload = frozenset(),
        sequence_parallel: int = 1,
    ) -> None:
        """Wrap a model loaded in dtype (float32 or bfloat16). Collective.

        sequence_parallel: number of neighbouring ranks sharing each micro-batch. A divisor of the number of ranks.
        """
        if "parameters" in offload and zero_stage != 3:
            raise UserError(
                f"Offloaded parameters need zero_stage 3, not {zero_stage}: at a lower stage, every rank has all "
                "parameters."
            )
        refuse_uneven_heads(module.config, sequence_parallel)
        import deepspeed  # after init_distributed, which sets the device

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.device = device
        self._settings, self._schedule = optimizer, schedule
        self._zero_stage: Literal[0, 1, 2, 3] = zero_stage
        self._dtype = dtype
        self._offload, self._deadline_s = offload, deadline_s
        self._steps = 0
        self._nonfinite_losses = 0
        self._dropouts = [m for m in module.modules() if isinstance(m, nn.Dropout) and m.p > 0.0]  # for adapters
        self._sequence_parallel = sequence_parallel
        self._sequence_group = make_group(sequence_parallel)
        self._clips_itself = zero_stage == 0 and dtype == torch.float32  # DeepSpeed then reports no norm
        groups = parameter_groups(module, optimizer)
        parameters = [p for group in groups for p in group.parameters]
        names = {p: name for name, p in module.named_parameters()}
        self._groups = [{names[p]: whole_numel(p) for p in group.parameters} for group in groups]
        self._lr_ratios = [group.lr_ratio for group in groups]
        self._decays = [group.decays for group in groups]
        self._optimizer = make_optimizer(groups, optimizer)
        self._engine, *_ = deepspeed.initialize(
            model=_Caller(module),
            optimizer=self._optimizer,
            model_parameters=parameters,
            config=self._deepspeed_config(offload, num_parameters=sum(map(whole_numel, parameters))),
            dist_init_required=False,
        )
        self._state = RankState(self._engine, self._optimizer, zero_stage=zero_stage)
        self._state.create()
        self._snapshots: Snapshots | None = None
        self._frozen_digest: str | None = None
        set_deadline(deadline_s)

    def _deepspeed_config(self, offload: Offload, *, num_parameters: int) -> dict[str, Any]:
        on_gpu = self.device.type == "cuda"
        bucket = min(num_parameters, BUCKET_ELEMENTS)  # DeepSpeed allocates the whole size
        zero: dict[str, Any] = {
            "stage": self._zero_stage,
            "overlap_comm": on_gpu,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "sub_group_size": SUB_GROUP_ELEMENTS,
        }
        for part, key in (("optimizer", "offload_optimizer"), ("parameters", "offload_param")):
            if on_gpu and part in offload:
                zero[key] = {"device": "cpu", "pin_memory": True}
        clip = self._settings.grad_clip
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # backward(last=) marks the end of a step
            "gradient_clipping": 0.0 if clip is None or self._clips_itself else clip,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }
        if self._dtype == torch.bfloat16:
            config["bf16"] = {"enabled": True, "check_grad_overflow": True}
            if self._zero_stage > 0:  # DeepSpeed has no float32 accumulation at stage 0
                config["data_types"] = {"grad_accum_dtype": "fp32"}
        return config

    @property
    def module(self) -> Any:
        """The model without DeepSpeed's wrappers."""
        return self._engine.module.module

    def forward(self, function: Callable[Concatenate[Any, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call function(module, ...) inside DeepSpeed, so that sharded weights are gathered around the call.

        Adapters drop out only where a gradient is taken. So all measurements of the model are for the same
        distribution.
        """
        for dropout in self._dropouts:
            dropout.train(torch.is_grad_enabled())
        try:
            with rows_shared_by(self._sequence_group):
                result: T = self._engine(function, *args, **kwargs)
        finally:
            for dropout in self._dropouts:
                dropout.train()  # for layers that are recomputed
        return result

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._nonfinite_losses += int(not torch.isfinite(loss.detach()))
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * dist.get_world_size())  # DeepSpeed divides by this number

    def end_gradient(self) -> None:
        self._nonfinite_losses = 0
        self._engine.set_gradient_accumulation_boundary(True)
        self._engine.allreduce_gradients()

    def step(self, divisor: float = 1.0, *, adam: AdamStep | None = None) -> StepReport:
        self._finish_snapshot()
        step = self._steps + 1
        nonfinite = int(self.all_reduce_sum(torch.tensor(self._nonfinite_losses, device=self.device)))
        self._nonfinite_losses = 0
        if nonfinite:
            nonfinite //= self._sequence_parallel  # every rank of the group counted the row
            raise RunError(f"The loss of {nonfinite} micro-batches was not finite in optimizer step {step}.")
        lr = self._settings.lr * lr_factor(self._schedule, step) if adam is None else adam.lr
        for group, ratio in zip(self._optimizer.param_groups, self._lr_ratios, strict=True):
            group["lr"] = lr * ratio
        with self._gradient_divided(divisor), self._settings_of(adam) as clip:
            clipped = self._clip(clip) if self._clips_itself else None
            if clipped is None or clipped < float("inf"):
                self._engine.step()
        norm = float(self._engine.get_global_grad_norm()) if clipped is None else clipped
        applied = self._engine.was_step_applied() if clipped is None else clipped < float("inf")
        if not applied:
            raise RunError(f"The gradient was not finite in optimizer step {step}. The weights are unchanged.")
        self._steps = step
        return StepReport(grad_norm=norm, lr=lr)

    @contextmanager
    def _gradient_divided(self, divisor: float) -> Iterator[None]:
        """Divide the gradient of the step in the block, before the norm is taken and clipped."""
        optimizer = self._engine.optimizer
        if hasattr(optimizer, "loss_scale") and self._zero_stage > 0:
            optimizer.loss_scale = divisor  # the optimizer divides the gradient by it; 1 during backward passes
            try:
                yield
            finally:
                optimizer.loss_scale = 1.0
            return
        if divisor != 1.0:
            whole = [p.grad for p in self.module.parameters() if p.grad is not None]
            for gradient in getattr(optimizer, "fp32_groups_gradients_flat", whole):  # of bfloat16 at stage 1
                gradient.div_(divisor)
        yield

    @contextmanager
    def _settings_of(self, adam: AdamStep | None) -> Iterator[float | None]:
        """Use a step's own settings, if any, in the block. Yield the largest norm of the gradient."""
        if adam is None:
            yield self._settings.grad_clip
            return
        optimizer = self._engine.optimizer
        clip = getattr(optimizer, "clip_grad", 0.0)
        with self._own_settings():
            for group, decays in zip(self._optimizer.param_groups, self._decays, strict=True):
                group.update(betas=adam.betas, eps=adam.eps, weight_decay=adam.weight_decay if decays else 0.0)
            if not self._clips_itself:
                optimizer.clip_grad = adam.grad_clip or 0.0
            try:
                yield adam.grad_clip
            finally:
                if not self._clips_itself:
                    optimizer.clip_grad = clip

    def _clip(self, largest: float | None) -> float:
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        norm = nn.utils.get_total_norm(p.grad for p in parameters if p.grad is not None)
        if largest is not None:
            nn.utils.clip_grads_with_norm_(parameters, largest, norm)
        return float(norm)

    def open_swapping(self) -> Swapping:
        if self._zero_stage not in TENANT_STAGES:
            raise UserError(
                f"cluster.roles.policy.zero_stage: is {self._zero_stage}, but adapters can take turns only at stage 0 "
                "or 3. For adapters, stages 1 and 2 save hardly any memory. Remove the key."
            )
        if self._offload or self._settings.name != "adamw":
            raise UserError("Adapters can take turns only with optimizer adamw and without offload.")
        return Swapping(self._engine, self._state, groups=self._groups, zero_stage=self._zero_stage)

    def keep_shadow(self, *, average: bool) -> ShadowWeights:
        """Copy the trained weights, and keep the copies in snapshots and checkpoints. Call before open_snapshots."""
        self._state.shadow = ShadowWeights(self._engine, sharded=self._zero_stage == 3, average=average)
        return self._state.shadow

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total

    def max_over_ranks(self, value: int) -> int:
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def named_weights(self, dtype: torch.dtype, *, with_tower: bool = True) -> Iterator[tuple[str, Tensor]]:
        sources = weight_sources(self.module) if with_tower else sources_without_tower(self.module)
        return whole_weights(sources, dtype, sharded=self._zero_stage == 3)

    def named_adapter_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        return whole_weights(adapter_sources(self.module), dtype, sharded=self._zero_stage == 3)

    def save(self, folder: Path) -> None:
        """Write the state. Of frozen weights: a digest, and copies of an adapter's initial state. Collective."""
        # Without its parent the folder is no longer this run's, so parents are not made.
        make_folder(folder, exist_ok=True)
        write_rank(folder, dist.get_rank(), self._state.tensors(), self._values())
        dist.barrier()

    def load(self, folder: Path) -> None:
        self._finish_snapshot()
        saved, own = EngineRecord.read(folder), self._record()
        saved.refuse_other(own, folder=folder)
        is_sharded_alike = saved.sharding == own.sharding
        frozen = own.frozen_weights if is_sharded_alike else f"{digest_over_ranks(self.module, saved.sharding):016x}"
        saved.refuse_other_base(frozen, folder=folder)
        take_over(self._state, folder, saved=saved, own=own)
        self._steps = saved.steps_of(own)
        dist.barrier()

    @contextmanager
    def _own_settings(self) -> Iterator[None]:
        """Restore the optimizer's settings after the block, such as betas."""
        own = [{key: group[key] for key in group if key != "params"} for group in self._optimizer.param_groups]
        yield
        for group, settings in zip(self._optimizer.param_groups, own, strict=True):
            group.update(settings)

    def _values(self) -> dict[str, Any]:
        """Return the state without its tensors, and the record. The first call is collective."""
        return {**self._state.values(), "record": self._record().model_dump()}

    def _record(self) -> EngineRecord:
        """Describe this engine and the engine's state. The first call is collective."""
        if self._frozen_digest is None:
            self._frozen_digest = f"{int(self.all_reduce_sum(torch.tensor(digest_of_base(self.module)))):016x}"
        return EngineRecord(
            model=architecture_fingerprint(self.module.config),
            ranks=dist.get_world_size(),
            zero_stage=self._zero_stage,
            dtype=str(self._dtype).removeprefix("torch."),
            optimizer=self._settings.name,
            groups=self._groups,
            frozen_weights=self._frozen_digest,
            steps=self._steps,
            updates_per_step=self._schedule.updates_per_step,
        )

    def open_snapshots(self, folder: Path, copies: CopyPlace | None = None) -> None:
        if copies is not None and not steps_in(folder):
            try:
                fetch_copies(copies, folder)
            except (OSError, ValueError) as error:
                logger.warning("The copies at %s could not be fetched: %s", copies.host, error)
        self._snapshots = Snapshots(folder, self._state.tensors(), deadline_s=self._deadline_s)

    def send_snapshots_to(self, place: CopyPlace | None) -> None:
        self._opened_snapshots.send_to(place)

    def take_snapshot(self, step: int) -> str | None:
        self._finish_snapshot()
        failure = self._opened_snapshots.wait_until_sent()
        dist.barrier()  # overwrite the older snapshot once all ranks have the newer snapshot and copy
        self._opened_snapshots.take(step, self._state.tensors(), self._values())
        return failure

    def newest_snapshot(self) -> int | None:
        return self._opened_snapshots.newest()

    def restore_snapshot(self, step: int) -> None:
        values = self._opened_snapshots.restore(step, self._state.tensors())
        self._state.restore(values)
        self._state.spread_masters()
        self._steps = values["record"]["steps"]

    @property
    def _opened_snapshots(self) -> Snapshots:
        assert self._snapshots is not None, "open_snapshots was called before"
        return self._snapshots

    def _finish_snapshot(self) -> None:
        """Wait for the copy of the state. Every change or move of the state begins with this wait."""
        if self._snapshots is not None:
            self._snapshots.wait()

    def offload_to_host(self) -> None:
        if self.device.type == "cuda":
            self.move_to_host()
            torch._C._cuda_clearCublasWorkspaces()  # up to 32 MiB a stream, kept by empty_cache
            torch.cuda.empty_cache()

    def reload_to_device(self) -> None:
        if self.device.type == "cuda":
            self.move_to_device()

    def move_to_host(self) -> None:
        """Move all states to host memory, on any device. Needs stage 2 or 3, and no offloaded parameters."""
        from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State

        self._finish_snapshot()
        moved = [State.lp_params, State.lp_grads, State.contiguous_grad_buffer]  # of any optimizer
        self._engine.offload_states(include=moved if self._zero_stage == 3 else None)
        self._state.move_rest(torch.device("cpu"), with_optimizer="optimizer" not in self._offload)

    def move_to_device(self) -> None:
        self._finish_snapshot()
        self._engine.reload_states()
        self._state.move_rest(self.device, with_optimizer="optimizer" not in self._offload)

    def close(self) -> None:
        """Drop DeepSpeed's hooks and buffers."""
        if self._snapshots is not None:
            self._snapshots.close()
        self._engine.destroy()


class _Caller(nn.Module):
    """Calls any function of the model in a forward pass. DeepSpeed gathers and releases weights around the call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        return function(self.module, *args, **kwargs)

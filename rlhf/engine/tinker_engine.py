"""The training engine on a server of the Tinker protocol, which holds the weights, the gradient and the optimizer.

Log-probabilities come from the server as a leaf of autograd. `backward` differentiates the loss with respect to the
leaf, and `step` sends the derivatives back as weights of a cross-entropy: the gradient of the sum of
(dloss/dlogprob) * logprob is the gradient of the loss. So every loss of log-probabilities works, computed here.
"""

from __future__ import annotations

import json
import logging
import secrets
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf.adapters import AdamStep
from rlhf.engine.schedule import lr_factor
from rlhf.engine.tinker_client import TinkerClient
from rlhf.engine.training_engine import OptimizerSettings, ScheduleSettings, StepReport
from rlhf.errors import RESUMES, RunError, UserError
from rlhf.models.packed.forward import policy_logprobs, policy_logprobs_only, supervised_loss
from rlhf.process.disk_full import when_there_is_room
from rlhf.tracking.run_folder.atomic import make_folder, read_object, write_atomic

P = ParamSpec("P")
T = TypeVar("T")
Row = tuple[Tensor, Tensor]  # the tokens of a sequence, and the positions of the tokens to score
STATE = "tinker.json"  # file of a checkpoint with the path of the state at the server
CHECKPOINTS = "checkpoints"  # the folder of a run
SAMPLER_TTL_S = 7 * 86_400  # of weights for sampling, if the run is killed; a live run deletes them earlier
EXPORT_TTL_S = 3600
DOWNLOAD_S = 300.0  # without a byte
logger = logging.getLogger(__name__)


class TinkerEngine:
    """Implements rlhf.engine.training_engine.TrainingEngine for a single rank without a model."""

    device = torch.device("cpu")

    def __init__(
        self,
        client: TinkerClient,
        model_config: Any,
        *,
        rank: int,
        seed: int,
        optimizer: OptimizerSettings,
        schedule: ScheduleSettings,
    ) -> None:
        """Make no model yet: a resumed run makes its model of a saved state.

        Args:
            model_config: of the base model, to count operations.
            rank: of the adapter.
            seed: of the adapter's initial values.
        """
        self.module: Any = nn.Module()
        self.module.config = model_config
        self.client, self._rank, self._seed = client, rank, seed
        self._settings, self._schedule = optimizer, schedule
        self._steps = self._nonfinite_losses = 0
        self._trained: Any = None  # the client's model, made at the first use
        self._base: Any = None  # a second model, which is never trained
        self._is_off = False  # whether passes use the base model
        self._passes: list[tuple[Tensor, list[Row]]] = []  # the leaves of passes since the last backward
        self._gradient: list[tuple[Tensor, Tensor]] = []  # tokens, and dloss/dlogprob of tokens[1:]
        self._states: set[str] = set()  # saved by this run, at the server
        self._samplers: list[str] = []

    def forward(self, function: Callable[Concatenate[Any, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return the same result as the function. RunError: the function needs more than log-probabilities."""
        found: Mapping[Any, Callable[..., Any]] = {
            policy_logprobs_only: self._logprobs,
            policy_logprobs: self._logprobs_without_entropy,
            supervised_loss: self._supervised_loss,
        }
        if function not in found:
            name = getattr(function, "__name__", str(function))
            raise RunError(f"policy.tinker: a server of the Tinker protocol returns log-probabilities, not {name}.")
        return cast("T", found[function](*args, **kwargs))

    def _logprobs(
        self,
        token_ids: Int[Tensor, " N"],
        lengths: Int[Tensor, " B"],
        *,
        mask: Bool[Tensor, " N"],
        branches: None = None,
        temperature: float | Tensor = 1.0,
    ) -> Float[Tensor, " N"]:
        """Return the log-probabilities of the tokens in mask, 0 elsewhere. With gradients enabled, as a leaf."""
        assert branches is None, "every row holds all tokens"
        if isinstance(temperature, Tensor) or temperature != 1.0:
            raise RunError(
                "policy.tinker: the server returns log-probabilities at temperature 1, and the data has a column "
                "`temperature` with other values. Remove the column."
            )
        rows: list[Row] = []
        starts = (lengths.cumsum(0) - lengths).tolist()
        places: list[Tensor] = []
        sequences = zip(starts, *(column.split(lengths.tolist()) for column in (token_ids, mask)), strict=True)
        for start, ids, chosen in sequences:
            if bool(chosen.any()):
                scored = chosen.nonzero()[:, 0]
                rows.append((ids[: int(scored[-1]) + 1], scored))
                places.append(start + scored)
        column = torch.zeros(len(token_ids))
        if rows:
            column[torch.cat(places)] = torch.cat(self._scored(rows))
        if torch.is_grad_enabled():
            column.requires_grad_()
            self._passes.append((column, [(ids, place) for (ids, _), place in zip(rows, places, strict=True)]))
        return column

    def _scored(self, rows: list[Row]) -> list[Tensor]:
        """Return the log-probabilities of the positions of each row."""
        data = [self._datum(ids, torch.ones(len(ids) - 1)) for ids, _ in rows]
        future = self._model().forward(data, "cross_entropy")
        outputs = self.client.wait(future, "the log-probabilities").loss_fn_outputs
        logprobs = [torch.as_tensor(output["logprobs"].data, dtype=torch.float32) for output in outputs]
        return [column[scored - 1] for column, (_, scored) in zip(logprobs, rows, strict=True)]

    def _logprobs_without_entropy(
        self, *args: Any, entropy_grad: bool = False, others: None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        assert not entropy_grad, "refused by the validation"
        assert others is None, "refused by the validation"
        logprobs = self._logprobs(*args, **options)
        return logprobs, torch.full_like(logprobs, torch.nan)

    def _supervised_loss(
        self,
        token_ids: Int[Tensor, " N"],
        lengths: Int[Tensor, " B"],
        *,
        mask: Bool[Tensor, " N"],
        token_weight: float,
        by_probability: bool = False,
        noise_alpha: float | None = None,
    ) -> tuple[Tensor, Tensor, None]:
        """Return the loss of rlhf.models.packed.forward.supervised_loss, the log-probabilities, and no top-1 hits."""
        assert noise_alpha is None, "refused by the validation"
        logprobs = self._logprobs(token_ids, lengths, mask=mask)
        weights = logprobs.detach().exp() if by_probability else torch.ones_like(logprobs)
        return -token_weight * (weights * logprobs)[mask].sum(), logprobs.detach(), None

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Keep the derivatives of the loss until the optimizer step."""
        self._nonfinite_losses += int(not torch.isfinite(loss.detach()))
        if loss.requires_grad:
            loss.backward()
        for leaf, rows in self._passes:
            slopes = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            for ids, places in rows:
                of_row = torch.zeros(len(ids) - 1)
                of_row[places - (int(places[-1]) - len(ids) + 1) - 1] = slopes[places]
                self._gradient.append((ids, of_row))
        self._passes.clear()

    def step(self, divisor: float = 1.0, *, adam: AdamStep | None = None) -> StepReport:
        """Send the gradient and the optimizer step. RunError: the server refused a request."""
        assert adam is None, "clients of a server have their own steps"
        step, settings = self._steps + 1, self._settings
        nonfinite, self._nonfinite_losses = self._nonfinite_losses, 0
        gradient, self._gradient = self._gradient, []
        if nonfinite or not all(bool(slopes.isfinite().all()) for _, slopes in gradient):
            raise RunError(f"The loss of {max(nonfinite, 1)} micro-batches was not finite in optimizer step {step}.")
        lr = settings.lr * lr_factor(self._schedule, step)
        params = self.client.types.AdamParams(
            learning_rate=lr,
            beta1=settings.betas[0],
            beta2=settings.betas[1],
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            grad_clip_norm=settings.grad_clip or 0.0,
        )
        model = self._model()
        data = [self._datum(ids, -slopes / divisor) for ids, slopes in gradient]
        computed, stepped = model.forward_backward(data, "cross_entropy"), model.optim_step(params)
        self.client.wait(computed, "the gradient")
        metrics = self.client.wait(stepped, f"optimizer step {step}").metrics or {}
        self._steps = step
        norms = [value for name, value in metrics.items() if name.partition(":")[0] == "grad_norm"]
        return StepReport(grad_norm=float(norms[0]) if norms else float("nan"), lr=lr)

    def _datum(self, ids: Tensor, weights: Tensor) -> Any:
        tokens, types = ids.tolist(), self.client.types
        given = {"target_tokens": tokens[1:], "weights": weights.tolist()}
        return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=given)

    def _model(self) -> Any:
        """Return the model for a pass, made at the first use."""
        if self._is_off:
            self._base = self._base or self._new_model()
            return self._base
        self._trained = self._trained or self._new_model()
        return self._trained

    def _new_model(self) -> Any:
        options: Any = {"rank": self._rank, "seed": self._seed, "train_unembed": False}
        future = self.client.service.create_lora_training_client(base_model=self.client.model, **options)
        return self.client.wait(future, "a new model")

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Compute the passes of the block with the base model: a new adapter is the identity."""
        self._is_off = True
        try:
            yield
        finally:
            self._is_off = False

    def publish(self) -> str:
        """Save the weights for sampling, and return their path at the server. Delete the weights before the last."""
        name = self._name("sampler")
        future = self._model().save_weights_for_sampler(name, ttl_seconds=SAMPLER_TTL_S)
        path = str(self.client.wait(future, "the weights for sampling").path)
        self._samplers.append(path)
        if len(self._samplers) > 2:
            self.client.delete(self._samplers.pop(0))
        return path

    def _name(self, kind: str) -> str:
        return f"{kind}-{self._steps:06d}-{secrets.token_hex(4)}"

    def save(self, folder: Path) -> None:
        """Save the state at the server, and its path in the folder. Delete the states of removed checkpoints."""
        path = str(self.client.wait(self._model().save_state(self._name("state")), "the state").path)
        make_folder(folder, exist_ok=True)
        write_atomic(folder / STATE, json.dumps({"path": path, "steps": self._steps}) + "\n")
        run = folder.parents[2]  # of a checkpoint in place, and of one that is being written
        if (run / CHECKPOINTS).is_dir():
            kept = {path, *self._states_of(run)}
            for gone in self._states - kept:
                self.client.delete(gone)
            self._states &= kept
        self._states.add(path)

    def _states_of(self, run: Path) -> set[str]:
        """Return the states named by the checkpoints of a run."""
        found = [read_object(file) for file in (run / CHECKPOINTS).glob(f"*/*/{STATE}")]
        return {str(values["path"]) for values in found if values is not None}

    def load(self, folder: Path) -> None:
        """Continue from a saved state. UserError: the folder names none, or the server has it no more."""
        values = read_object(folder / STATE)
        if values is None:
            raise UserError(
                f"{folder} has no {STATE}: the checkpoint was not made with policy.tinker. Resume without "
                "policy.tinker."
            )
        path = str(values["path"])
        future = self.client.service.create_training_client_from_state_with_optimizer(path)
        self._trained = self.client.wait(future, f"the state {path}")
        self._steps = int(values["steps"])
        self._states |= self._states_of(folder.parents[2])

    def download(self, folder: Path) -> None:
        """Write the adapter as peft's files. RunError: the download failed."""
        future = self._model().save_weights_external(self._name("export"), ttl_seconds=EXPORT_TTL_S)
        path = self.client.wait(future, "the export").path
        urls = self.client.wait(self.client.rest.get_external_weights_urls(path), "the files").urls
        for name, url in sorted(urls.items()):
            target = (folder / name).resolve()
            if target.parent != folder.resolve():
                raise RunError(f"policy.tinker: {self.client.server.url} names the file {name!r:.100} of an adapter.")
            try:
                with urllib.request.urlopen(url, timeout=DOWNLOAD_S) as answer:
                    content = answer.read()
            except (OSError, urllib.error.URLError) as error:
                raise RunError(f"policy.tinker: {name} of the export failed: {error} {RESUMES}") from error
            when_there_is_room(target, partial(target.write_bytes, content))
        self.client.delete(path)

    def named_weights(self, dtype: torch.dtype, *, with_tower: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of the base model at the server, which stands for the weights before training."""
        text = f"{self.client.server.url} {self.client.model}"
        yield "base_model", torch.tensor(list(text.encode()), dtype=torch.uint8)

    def named_adapter_weights(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield nothing: the weights stay at the server, also on the way to its engines."""
        return iter(())

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        return values.clone()  # there is only one rank

    def max_over_ranks(self, value: int) -> int:
        return value

    def _do_nothing(self) -> None:
        """There are no weights here to move, and the gradient is sent with the optimizer step."""

    end_gradient = offload_to_host = reload_to_device = _do_nothing

    def _refuse(self, *args: Any, **options: Any) -> Any:
        raise RunError("policy.tinker: the weights are at the server, so there are no copies of them here.")

    open_swapping = keep_shadow = open_snapshots = send_snapshots_to = _refuse
    take_snapshot = newest_snapshot = restore_snapshot = _refuse

"""Offer the roles of an online run to the loop of a user (rlhf.start).

    sample -> experience -> forward_backward -> optim_step -> sync, within a step

The methods make the calls of rlhf.controller.online, so the same order gives the same numbers.
This module adds the order of the calls, and the row of a step.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from rlhf.config.schema.root import Config
from rlhf.controller.advantage_learning import AdvantageLearning, Experience, training_signals
from rlhf.controller.collect import Outcomes
from rlhf.controller.learning import OnlineRoles, Signals
from rlhf.controller.online import OnlineController
from rlhf.controller.own_loss import Loss, own_loss
from rlhf.controller.rollout_queue import Batch
from rlhf.controller.rollout_report import rollout_metrics
from rlhf.controller.rollout_scorer import request_for
from rlhf.controller.step_attempt import StepAttempt
from rlhf.errors import UserError
from rlhf.role_table import GUESTS_OF_ENGINES
from rlhf.roles import Metrics, Ref, ScoredGroup
from rlhf.rollouts.records.texts import response_texts
from rlhf.tracking.metrics.declarations import is_declared, merge_metrics, results
from rlhf.tracking.metrics.reductions import Last
from rlhf.types import GroupRequest, Prompt, Rollouts, TokenValues

NEXT = "Begin the next step: `async with loop.next_step():`."
OWN_PROMPTS_FROM = 2**52  # ids of prompts that are no row of the data


class OwnLoop:
    """The roles of a run, for a loop of your own. `rlhf.start` yields this object, and ends the roles with the block.

    A step is a block of `next_step`. The updates in the block lead from one version of the weights to the next version.
    `step` is the number of the last finished step, `config` the configuration and `roles` the roles' own interfaces
    (rlhf/roles.py). Every method raises UserError for a call in the wrong order or after the block, and RunError, or
    its subclass WorkerLost, if a role fails. After a failed role no call works any more: leave the block.
    """

    def __init__(
        self,
        controller: OnlineController,
        *,
        tokenizer: Any,
        fetch: Callable[[Ref[Any]], Awaitable[Any]],
        read: Callable[[Mapping[str, Any], int], Prompt],
        write_final: Callable[[], Awaitable[Path]],
        written: Config,
    ) -> None:
        """Create a loop before the first step.

        Args:
            fetch: returns a value from another process.
            read: makes a prompt of columns and an id, as of a row of the data.
            write_final: writes the model into the run's folder.
            written: the configuration as the user wrote it.
        """
        self.config: Config = controller.config
        self.roles: OnlineRoles = controller.roles
        self.folder: Path = controller.record.folder.path
        self.tokenizer = tokenizer
        self._controller, self._record = controller, controller.record
        self._fetch, self._read, self._write_final, self._written = fetch, read, write_final, written
        self._failure: str | None = None  # why no call works any more
        self._in_step = self._is_stale = False  # whether the engines' weights or GPUs have passed to the trainers
        self._gradient: str | None = None  # none, or "open" or "whole" between forward_backward and optim_step
        self._num_prompts = 0  # number of prompts made by the user
        self._has_row = False  # whether the evaluation before the first step is logged
        self._begin_step()

    def _begin_step(self) -> None:
        self._sampled: list[ScoredGroup] = []
        self._parts: list[Experience] = []
        self._given: Sequence[Any] = ()  # responses of the data, by minibatch
        self._is_configured = False  # whether the configuration chose the step's prompts
        self._signals: Signals | None = None  # result of `learn`

    @property
    def step(self) -> int:
        """Return the number of the last finished step: 0 at first, and more in a resumed run."""
        return self._controller.step

    @property
    def num_steps(self) -> int:
        """Return train.steps, the length of the learning rate's schedule."""
        return self.config.train.num_steps

    async def begin(self) -> None:
        """Give the engines their first weights."""
        self._record.begin_step(self.step)
        await self._controller.begin()

    def end(self) -> None:
        """Refuse all later calls."""
        self._failure = self._failure or "the block of rlhf.start has ended. Make the call within the block"

    @asynccontextmanager
    async def next_step(self) -> AsyncIterator[int]:
        """Begin a step, and log the step's row and samples after the block. Yield the step's number, from 1.

        After an exception in the block there is no row, and no later call works. UserError at the end: an update
        without `sync`.
        """
        number = self.step + 1
        with self._calling("next_step"):
            if self._in_step:
                raise UserError("next_step: the previous step has not ended. Leave its block first.")
            self._begin_step()
            self._record.begin_step(number)
        self._in_step = True
        try:
            with self._giving_up(f"step {number}"):
                with self._record.stage("step"):
                    yield number
                with self._calling("next_step"):
                    if self._gradient is not None or self._is_stale:
                        missing = "sync" if self._gradient is None else "optim_step and sync"
                        raise UserError(
                            f"next_step: step {number} ends without {missing}. Call {missing} in the block."
                        )
                    await self._finish_step()
        finally:
            self._in_step = False

    def prompts(self, count: int | None = None) -> list[Prompt]:
        """Return the next prompts of the data, in the shuffled order of the run (default: rollouts.prompts_per_step).

        A checkpoint holds the place, so a resumed run continues with the next prompt.
        """
        with self._calling("prompts"):
            chosen = self._controller.collector.next(
                self._controller.rollouts.prompts_per_step if count is None else count
            )
            return [prompt for _, prompt in chosen]

    def prompt(self, text: str | Sequence[Mapping[str, Any]], **columns: Any) -> Prompt:
        """Return a prompt of your own: a text, or messages. The columns go to the rewards, as from a row of the data.

        UserError: the prompt does not fit the configuration, such as the longest prompt of data.train.
        """
        with self._calling("prompt"):
            self._num_prompts += 1
            own = {"prompt" if isinstance(text, str) else "messages": text, **columns}
            return self._read(own, OWN_PROMPTS_FROM + self._num_prompts)

    async def sample(self, prompts: Sequence[Prompt] | None = None) -> list[ScoredGroup]:
        """Sample rollouts.samples_per_prompt responses to each prompt, and score them by the configuration's rewards.

        Without `prompts`, sample the batch of `rlhf train`: the next prompts, with dynamic sampling, oversampling and
        curriculum as configured. With prompts, a group with a failed reward has `scores.errors` and no score.

        Returns:
            a group for each prompt, in order: `prompt`, `group.infos` with a length for each response,
            `scores.scores` and `scores.by_name`.
        """
        with self._calling("sample", in_step=True):
            if self._is_stale:
                raise UserError(
                    "sample: the policy was updated, but the engines still have older weights. Call sync first."
                )
            controller, record, step = self._controller, self._record, self.step + 1
            version = controller.scorer.weights[0]
            if prompts is None:
                if self._sampled:
                    raise UserError(
                        "sample: this step has already sampled. Name the prompts: `loop.sample(loop.prompts(8))`."
                    )
                metrics: list[Metrics] = []
                with record.apart(metrics, is_shown=True), record.stage("rollouts"):
                    collected = await controller.collector.collect(step, version=version)
                controller.measure_rollouts(Batch(collected=collected, metrics=metrics), step)
                groups, self._is_configured = collected.groups, True
            else:
                _refuse_other(
                    "sample", prompts, Prompt, "a list of prompts, of `loop.prompt(text)` or `loop.prompts()`"
                )
                with record.stage("rollouts"):
                    requests = [self._request(prompt) for prompt in prompts]
                    sampling = controller.sampling
                    groups = await controller.scorer.score_all(requests, sampling, step=step, version=version)
                outcomes = Outcomes()
                for scored in groups:
                    controller.collector.sort(scored, outcomes, step)
                if outcomes.measured:
                    record.add(rollout_metrics(outcomes.measured, version=step - 1))
            self._sampled += groups
            return groups

    def _request(self, prompt: Prompt) -> GroupRequest:
        """Return a request with seeds and sequence ids of no earlier request."""
        samples, number = self._controller.rollouts.samples_per_prompt, self._controller.collector.next_group
        self._controller.collector.next_group += 1
        return request_for(
            prompt,
            group_id=number,
            first_sequence_id=number * samples,
            samples=samples,
            run_seed=self.config.run.seed,
            epoch=number,
            temperature=prompt.temperature,
        )

    async def rollouts(self, group: ScoredGroup) -> Rollouts:
        """Return the tokens of a group's responses, with the sampler's log-probabilities, in flat columns."""
        with self._calling("rollouts"):
            _refuse_other("rollouts", [group], ScoredGroup, "a group of `await loop.sample()`")
            found: Rollouts = await self._fetch(group.group.rollouts)
            return found

    async def texts(self, group: ScoredGroup) -> list[str]:
        """Return the text of each response of a group."""
        rollouts = await self.rollouts(group)
        return response_texts(rollouts, self.tokenizer, turn_end=group.prompt.turn_end)

    async def reference_logprobs(self, groups: Sequence[ScoredGroup]) -> list[TokenValues]:
        """Return the reference's log-probability of each token of `rollouts`, for each group, in order.

        UserError: the run has no separate reference (algorithm.kl.coef above 0, without LoRA).
        """
        with self._calling("reference_logprobs", in_step=True):
            if self.roles.reference is None:
                raise UserError(
                    "reference_logprobs: the run has no reference. Set algorithm.kl.coef above 0, without LoRA."
                )
            await self._to_trainers()
            columns = await self._advantages("reference_logprobs").reference_logprobs(groups)
            return [await self._fetch(column.ref) for column in columns]

    async def experience(
        self, groups: Sequence[ScoredGroup], advantages: Sequence[Sequence[float]] | None = None
    ) -> Experience:
        """Load groups into the trained ranks as the batch of the next gradients, with the columns of the loss.

        The reference's and the old log-probabilities, the critic's values and the advantages are computed as the
        configuration says. The batch replaces the batch before.

        Args:
            advantages: a number for each response of each group. None: the algorithm computes the advantages.

        Returns:
            the batch; `plan.minibatches` are the parts for `forward_backward`.
        """
        with self._calling("experience", in_step=True):
            learning, own = self._advantages("experience"), None
            _refuse_other("experience", groups, ScoredGroup, "a list of groups, of `await loop.sample()`")
            ids = [info.sequence_id for one in groups for info in one.group.infos]
            if not ids:
                raise UserError("experience: `groups` is empty. Give at least one group of `sample`.")
            if len(set(ids)) < len(ids):
                raise UserError(
                    "experience: `groups` has a group twice, or groups of `sample()` from several steps. Give each "
                    "group once, and only groups of this step."
                )
            if failed := [one for one in groups if one.scores.errors]:
                raise UserError(f"experience: {len(failed)} groups have a failed reward. Leave them out.")
            if advantages is not None:
                if self.roles.critic is not None:
                    raise UserError("experience: the critic estimates the advantages of this run; leave them out.")
                own = _by_sequence(groups, advantages)
            await self._to_trainers()
            batch = await learning.prepare(groups, self.step + 1, own)
            count = len(batch.plan.minibatches) if batch.plan.scores else 0
            self._given = learning.given(groups, self.step + 1, num_minibatches=count)
            self._parts.append(batch)
            return batch

    def visits(self, batch: Experience) -> list[int]:
        """Return the minibatch of each optimizer step of a batch, over train.epochs_per_batch epochs."""
        _refuse_other("visits", [batch], Experience, "the batch of `await loop.experience(groups)`")
        count = len(batch.plan.minibatches) if batch.plan.scores else 0
        return self._controller.learning.visits(count, self.step + 1)

    async def forward_backward(
        self, minibatch: int = 0, *, loss: Loss | None = None, accumulate: bool = False
    ) -> dict[str, float]:
        """Compute the gradient of a minibatch of the last batch of `experience`, in every trained role.

        Args:
            loss: replaces the configured algorithm's policy loss of each token: the name of an algorithm, the
                section of an algorithm as a mapping, or a function. The function takes a micro-batch
                (rlhf.algorithms.microbatch.PolicyMicrobatch), returns a tensor of shape [N] or a Surrogate, and travels
                to the ranks. Aggregation, KL penalty, correction and entropy bonus follow the configuration.
            accumulate: a further forward_backward comes before `optim_step`, and the gradients add up.

        Returns:
            the metrics of the minibatch, also for the step's row.
        """
        with self._calling("forward_backward", in_step=True):
            learning = self._advantages("forward_backward")
            _refuse_other("forward_backward", [minibatch], int, "a minibatch of `loop.visits(batch)`")
            num = len(self._parts[-1].plan.minibatches) if self._parts and self._parts[-1].plan.scores else 0
            if not 0 <= minibatch < num:
                text = (
                    f"the batch has {num} minibatches" if self._parts else "no batch is loaded; call experience first"
                )
                raise UserError(f"forward_backward: the minibatch is {minibatch}, and {text}.")
            if self._gradient == "whole":
                raise UserError(
                    "forward_backward: there is a gradient already. Call optim_step first, or pass accumulate=True to "
                    "all but the last forward_backward."
                )
            if accumulate and self.roles.critic is not None:
                raise UserError("forward_backward: accumulate is for runs without a critic.")
            own = None if loss is None else own_loss(loss, self._written)
            given, parts = self._given[minibatch] if self._given else (), list[Metrics]()
            with self._giving_up("forward_backward"), self._record.stage("update"):
                for role in learning.trained(self.step + 1):
                    if role is self.roles.policy:
                        options: Any = {"ends": not accumulate, "loss": own}
                        parts.append(await self.roles.policy.forward_backward(minibatch, given, **options))
                    else:
                        parts.append(await role.forward_backward(minibatch))
            self._gradient = "open" if accumulate else "whole"
            return self._measured(parts)

    async def optim_step(self) -> dict[str, float]:
        """Update the weights by the gradient. Return the norm of the gradient and the learning rate.

        UserError: there is no gradient, or the step has synced its weights already.
        """
        with self._calling("optim_step", in_step=True):
            if self._gradient is None:
                raise UserError("optim_step: there is no gradient. Call forward_backward first.")
            if self._controller.scorer.weights[0] > self.step:
                raise UserError(f"optim_step: step {self.step + 1} has synced its weights. {NEXT}")
            with self._giving_up("optim_step"), self._record.stage("update"):
                parts = [await role.optim_step() for role in self._advantages("optim_step").trained(self.step + 1)]
            self._gradient, self._is_stale = None, True
            return self._measured(parts)

    async def learn(self, groups: Sequence[ScoredGroup]) -> None:
        """Make all updates of a step as `rlhf train` does, with any algorithm on rollouts: pairs and teachers too."""
        with self._calling("learn", in_step=True):
            _refuse_other("learn", groups, ScoredGroup, "a list of groups, of `await loop.sample()`")
            await self._to_trainers()
            with self._giving_up("learn"):
                self._signals = await self._controller.learning.learn(groups, self.step + 1)
            self._is_stale = True

    async def sync(self) -> None:
        """Give the engines the weights of this step, and prove the transfer by version, checksum and log-probabilities.

        A step syncs once, after its last update. RunError: an engine has other weights than the policy.
        """
        with self._calling("sync", in_step=True):
            step, controller = self.step + 1, self._controller
            if self._gradient is not None:
                raise UserError("sync: a gradient waits for optim_step. Call optim_step first.")
            if controller.scorer.weights[0] == step:
                raise UserError(f"sync: step {step} has synced its weights already. {NEXT}")
            with self._giving_up("sync"):
                if controller.learning.renews_reference(step):
                    await controller.learning.renew_reference(step)
                await controller.sync(step)
            self._is_stale = False

    async def evaluate(self) -> dict[str, float]:
        """Answer and score the evaluation sets, after `sync` in a step, or before the first step.

        Returns:
            `eval/*`, also for the row of the step. Before the first step, this is the row of step 0.
        """
        with self._calling("evaluate"):
            step = self.step + self._in_step
            is_late = self._has_row if not step else not self._in_step
            if self._controller.scorer.weights[0] != step or is_late:
                raise UserError("evaluate: call evaluate in a step after `sync`, or once before the first step.")
            metrics: list[Metrics] = []
            with self._giving_up("evaluate"), self._record.apart(metrics, is_shown=True):
                await self._controller.evaluate(step)
            found = self._measured(metrics)
            if not step:
                self._record.write_row(0, self._record.row())
                self._has_row = True
            return {key: value for key, value in found.items() if key.startswith("eval/")}

    def record(self, **numbers: float) -> None:
        """Add numbers of your own to the step's row, under `own/NAME`."""
        with self._calling("record", in_step=True):
            for name, number in numbers.items():
                is_number = hasattr(number, "__float__") and math.isfinite(number)
                if not (is_number and is_declared(f"own/{name}")):
                    text = "expected a name of letters, digits, _, . and -, and a finite number"
                    raise UserError(f"record: {name!r} is {number}, {text}.")
            self._record.add({f"own/{name}": Last(value=float(number)) for name, number in numbers.items()})

    async def save(self) -> Path:
        """Write a checkpoint of the last finished step (weights, optimizer, place in the data). Return the folder."""
        with self._calling("save", in_step=False):
            if not self.step:
                raise UserError("save: no step has ended yet. Call save after the first step's block.")
            with self._giving_up("save"):
                await self._controller.save_step()
            return self._record.folder.checkpoint(self.step)

    async def load(self, folder: str | Path) -> None:
        """Load weights and optimizer of a checkpoint, and sync the weights. The position in the data does not
        change."""
        folder = Path(folder)
        with self._calling("load", in_step=False):
            if not all((folder / name).is_dir() for name in self._controller.trained):
                raise UserError(f"load: {folder} is no checkpoint. Give the folder that `save` returned.")
            with self._giving_up("load"):
                async with self._controller.saving():
                    for name, role in self._controller.trained.items():
                        await role.load(folder / name)
                await self._controller.sync(self.step)

    async def export(self) -> Path:
        """Write the model to final/ in the run's folder, and return final/. The run counts as finished."""
        with self._calling("export", in_step=False), self._giving_up("export"):
            final = await self._write_final()
            self._is_stale = bool(self._controller.sharing)
            return final

    def _measured(self, parts: Sequence[Metrics]) -> dict[str, float]:
        for metrics in parts:
            self._record.add(metrics)
        return results(merge_metrics(parts))

    async def _finish_step(self) -> None:
        controller, step = self._controller, self.step + 1
        signals = self._signals or training_signals([part for part in self._parts if part.plan.scores])
        sound = [one for one in self._sampled if not one.scores.errors]
        attempt = StepAttempt(step, controller.learning, controller.scorer, controller.sampling)
        attempt.groups, attempt.signals = sound, signals
        await attempt.read_signals()
        controller.learning.end_step(sound, signals)
        await attempt.write_samples()
        is_whole = self._is_configured and "time/update_s" in self._record.row()
        await controller.finish_step(step, has_throughput=is_whole)

    async def _to_trainers(self) -> None:
        """Give shared GPUs to the trained roles."""
        if self._controller.sharing and not self._is_stale:
            await self._controller.to_trainers(*GUESTS_OF_ENGINES, keep_weights=False)
            self._is_stale = True

    def _advantages(self, call: str) -> AdvantageLearning:
        learning = self._controller.learning
        if not isinstance(learning, AdvantageLearning):
            name = self.config.algorithm.short_name
            raise UserError(
                f"{call}: this call needs an algorithm with advantages, and {name} has no advantages. Call learn "
                "instead."
            )
        return learning

    @contextmanager
    def _calling(self, call: str, *, in_step: bool | None = None) -> Generator[None]:
        """Raise UserError for a call after a failure or after the block, or in the wrong place."""
        if self._failure is not None:
            raise UserError(f"{call}: {self._failure}.")
        if in_step is not None and in_step is not self._in_step:
            place = "belongs in a step: `async with loop.next_step():`" if in_step else "belongs after a step's block"
            raise UserError(f"{call}: {place}.")
        yield

    @contextmanager
    def _giving_up(self, work: str) -> Generator[None]:
        """Let no later call use roles after a failure in the block, since a part of the work may be done."""
        try:
            yield
        except BaseException as error:
            text = f"{type(error).__name__}: {error}".rstrip(".")
            self._failure = self._failure or f"{work} failed ({text}). Leave the block of rlhf.start"
            raise


def _refuse_other(call: str, values: Any, kind: type, expected: str) -> None:
    """Raise UserError unless a value is a sequence of objects of a class."""
    wrong = [value for value in values if not isinstance(value, kind)] if isinstance(values, Sequence) else [values]
    if wrong:
        raise UserError(f"{call}: got a {type(wrong[0]).__name__}, expected {expected}.")


def _by_sequence(groups: Sequence[ScoredGroup], advantages: Sequence[Sequence[float]]) -> dict[int, float]:
    sizes = [len(one.group.infos) for one in groups]
    try:
        given = [len(values) for values in advantages]
    except TypeError as error:
        raise UserError("experience: advantages is no list of lists. Give each group a list of numbers.") from error
    if sizes != given:
        raise UserError(
            f"experience: advantages has groups of {given} numbers, expected {sizes}, one for each response."
        )
    infos = [info for one in groups for info in one.group.infos]
    values = [float(value) for of_group in advantages for value in of_group]
    if wrong := [value for value in values if not math.isfinite(value)]:
        raise UserError(f"experience: an advantage is {wrong[0]}, expected a finite number.")
    return {info.sequence_id: value for info, value in zip(infos, values, strict=True)}

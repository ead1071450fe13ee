"""The loop of training on rollouts.

    prompts -> rollouts -> rewards -> experience -> advantages -> minibatches -> update -> weight sync

Version v of the weights is what v steps of training have made. Step s answers its prompts with version s - 1 (rollouts
and training take turns), trains, and syncs version s to the engines before it ends. A step is kept in this order: its
checkpoint is written aside, its row is logged, the checkpoint is made valid; so a checkpoint always has its row.

The loop sees scalars, ids and references. It computes nothing on tokens and knows nothing of Ray.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rlhf.config.derive import pairs_rollouts
from rlhf.config.root import Config
from rlhf.controller.answers import Answers, request_for
from rlhf.controller.by_advantages import AdvantageLearning
from rlhf.controller.by_pairs import PairLearning
from rlhf.controller.evaluation import evaluate
from rlhf.controller.learning import Learning, OnlineRoles
from rlhf.controller.record import Best, RunRecord
from rlhf.controller.sampling import group_samples, rollout_metrics
from rlhf.controller.trained import trained_models
from rlhf.controller.training_scores import for_training
from rlhf.controller.weight_sync import sync_weights
from rlhf.data.stream import Cursor, Stream
from rlhf.errors import RunError
from rlhf.rewards.scoring import describe
from rlhf.roles import (
    CriticRole,
    PolicyRole,
    ReferenceRole,
    RewardRole,
    RolloutRole,
    ScoredGroup,
    TrainedRole,
)
from rlhf.tracking.reductions import Last, Max, Sum
from rlhf.tracking.samples import samples_path
from rlhf.types import GroupRequest, Prompt, Sampling

logger = logging.getLogger(__name__)


class OnlineController:
    """One run. `step` is the last step that is done."""

    def __init__(
        self,
        config: Config,
        roles: OnlineRoles,
        record: RunRecord,
        *,
        prompts: Stream[Prompt],
        eval_sets: Mapping[str, Sequence[Prompt]],
        probe_ids: Sequence[int],
        policy_fingerprint: str,
        rewards_fingerprint: str,
    ) -> None:
        assert config.rollouts is not None
        self.config = config
        self.roles = roles
        self.record = record
        self.prompts = prompts
        self.eval_sets = eval_sets
        self.probe_ids = probe_ids
        self.fingerprint = policy_fingerprint
        self.rollouts = config.rollouts
        self.sampling = Sampling(
            max_new_tokens=self.rollouts.max_new_tokens,
            temperature=self.rollouts.temperature,
            top_p=self.rollouts.top_p,
            top_k=self.rollouts.top_k,
            stop=self.rollouts.stop,
        )
        self.step = 0
        self.next_group = 0
        self.learning: Learning = (PairLearning if pairs_rollouts(config) else AdvantageLearning)(config, roles, record)
        first_set = next(iter(eval_sets), "heldout")
        self.best = Best.of(config.train, f"eval/{first_set}/score", default_lower=False)
        self.answers = Answers(roles.rollout, roles.reward, record, rewards_fingerprint=rewards_fingerprint)
        self.takes_turns = config.cluster.device == "cuda" and config.cluster.roles.rollout.colocate_with is not None

    async def run(self) -> None:
        """Train until the last step. Continues from `step` if a checkpoint has been restored."""
        train, record = self.config.train, self.record
        record.begin_step()
        self.arithmetic = await self.roles.policy.arithmetic()
        await self._sync(self.step)
        if self.step == 0 and self.eval_sets and self.config.eval.at_start:
            await self._evaluate(0)
            record.write_row(0, record.row())
        while self.step < train.steps and not self.best.is_over:
            step = self.step + 1
            record.begin_step()
            with record.stage("step"):
                await self._train_step(step)
            last = step == train.steps
            evaluates = bool(self.eval_sets) and (last or step % self.config.eval.every == 0)
            if evaluates:
                await self._evaluate(step)
            await self._add_memory()
            self._add_throughput()
            self.step = step
            is_best = evaluates and self.best.improves(record.row(), step)
            if last or is_best or self.best.is_over or step % train.checkpoint_every == 0:
                await self._checkpoint(is_best=is_best)
            else:
                record.write_row(step, record.row())
        await self._to_trainers(keep_weights=False)  # for the export
        best = self.best.step
        if train.early_stopping is not None and best is not None and best != self.step:
            logger.info("%s was best at step %d: that is the final model", self.best.metric, best)
            await self.roles.policy.load(record.folder.checkpoint(best) / "policy")

    async def _train_step(self, step: int) -> None:
        """The arrows of the module's first line."""
        roles, record = self.roles, self.record
        with record.stage("rollouts", role="rollout"):
            groups = await self._collect(step)
        record.add(rollout_metrics(groups, version=step - 1))
        await self._to_trainers(keep_weights=False)
        signals = await self.learning.learn(for_training(groups, self.config.rewards), step)
        await self._sync(step)
        kept = self.config.tracking.samples_per_step
        if kept:
            chosen = group_samples(groups, signals, split="train", most=kept)
            await roles.reward.write_samples(samples_path(record.folder.path, step), chosen)

    async def _collect(self, step: int) -> list[ScoredGroup]:
        """A whole batch of scored groups in plan order. A group whose reward failed is replaced by another prompt's."""
        count, per_prompt = self.rollouts.prompts_per_step, self.rollouts.samples_per_prompt
        policy = self.config.reward_policy
        slots: list[ScoredGroup | None] = [None] * count
        dropped = 0
        while any(slot is None for slot in slots):
            empty = [index for index, slot in enumerate(slots) if slot is None]
            requests = [
                self._request(prompt, epoch, first_sequence_id=index * per_prompt)
                for index, (epoch, prompt) in zip(empty, self.prompts.next(len(empty)), strict=True)
            ]
            scored = await self.answers.to(requests, self.sampling, step=step, version=step - 1)
            for index, group in zip(empty, scored, strict=True):
                if not group.scores.errors:
                    slots[index] = group
                    continue
                dropped += 1
                if policy.on_error == "fail" or dropped > policy.max_dropped_fraction * count:
                    self.answers.ledger.forget_failures()
                    raise RunError(
                        f"rewards, step {step}: {describe(group.scores.errors)}. "
                        + (
                            "reward_policy.on_error is fail; drop would replace such a prompt by another."
                            if policy.on_error == "fail"
                            else f"{dropped} of {count} groups were dropped, more than reward_policy."
                            f"max_dropped_fraction {policy.max_dropped_fraction} allows."
                        )
                    )
        self.record.add({"rollouts/dropped_groups/total": Sum(total=dropped)})
        return [slot for slot in slots if slot is not None]

    def _request(self, prompt: Prompt, epoch: int, *, first_sequence_id: int) -> GroupRequest:
        group = request_for(
            prompt,
            group_id=self.next_group,
            first_sequence_id=first_sequence_id,
            samples=self.rollouts.samples_per_prompt,
            run_seed=self.config.run.seed,
            epoch=epoch,
        )
        self.next_group += 1
        return group

    async def _sync(self, version: int) -> None:
        """Weights to the engines, proven; then the engines have the GPU."""
        roles, record = self.roles, self.record
        if self.takes_turns:
            await roles.rollout.wake("weights")
        record.progress.stage("weight_sync")
        with record.timeline.span("weight_sync", "rollout"):
            report = await sync_weights(
                roles.policy,
                roles.rollout,
                version=version,
                probe_ids=self.probe_ids,
                dtype=self.config.policy.dtype,
                hand_over=self._to_engines,
            )
        record.add(
            {
                "weight_sync/version": Last(value=report.version),
                "weight_sync/probe_max_diff": Max(value=report.probe_max_diff),
                "time/weight_sync_s": Sum(total=report.seconds),
                "time/probe_s": Sum(total=report.probe_seconds),
            }
        )

    async def _to_trainers(self, *, keep_weights: bool) -> None:
        """Where they share GPUs: the engines sleep, and the trained roles take their states back."""
        if self.takes_turns:
            await self.roles.rollout.sleep(keep_weights=keep_weights)
            await asyncio.gather(*(role.reload() for role in self._beside_engines()))

    async def _to_engines(self) -> None:
        """The other way, with the engines' weights there already: their caches come last, and take what is free."""
        if self.takes_turns:
            await asyncio.gather(*(role.offload() for role in self._beside_engines()))
            await self.roles.rollout.wake("cache")

    def _beside_engines(self) -> list[TrainedRole]:
        """Trained roles on the engines' GPUs: the policy, and a critic that is colocated with it."""
        critic = self.roles.critic
        shares = critic is not None and self.config.cluster.roles.critic.colocate_with is not None
        return [self.roles.policy, *([critic] if critic is not None and shares else [])]

    async def _evaluate(self, step: int) -> None:
        await evaluate(self.eval_sets, self.config, self.answers, self.roles.reward, self.record, step=step)

    async def _add_memory(self) -> None:
        roles = self.roles
        members: dict[str, PolicyRole | RolloutRole | RewardRole | ReferenceRole | CriticRole | None] = {
            "policy": roles.policy,
            "rollout": roles.rollout,
            "reward": roles.reward,
            "reference": roles.reference,
            "critic": roles.critic,
        }
        for name, role in members.items():
            if role is not None:
                self.record.memory(name, await role.memory())

    def _add_throughput(self) -> None:
        row = self.record.row()
        responses = self.rollouts.prompts_per_step * self.rollouts.samples_per_prompt
        trained = row.get("update/tokens/total", 0.0) / row["time/update_s"]  # 0 while only the critic is trained
        mean_length = row["rollouts/tokens/total"] / responses
        self.record.add(
            {
                "throughput/tokens_per_s": Last(value=row["rollouts/tokens/total"] / row["time/step_s"]),
                "throughput/rollout_tokens_per_s": Last(
                    value=row["rollouts/response_tokens/mean"] * responses / row["time/rollouts_s"]
                ),
                "throughput/train_tokens_per_s": Last(value=trained),
                "throughput/mfu": Last(
                    value=self.arithmetic.utilisation(tokens_per_s=trained, mean_length=mean_length)
                ),
                "data/epoch": Last(value=float(self.prompts.state().epoch)),
            }
        )

    async def _checkpoint(self, *, is_best: bool) -> None:
        """Write the checkpoint aside, log the step, make the checkpoint valid."""
        folder, roles = self.record.folder, self.roles
        with self.record.stage("checkpoint"):
            aside = folder.begin_checkpoint(self.step)
            await self._to_trainers(keep_weights=True)
            await roles.policy.save(aside / "policy")
            if roles.critic is not None:
                await roles.critic.save(aside / "critic")
            if self.takes_turns:
                await roles.rollout.wake("weights")
            await self._to_engines()
            self.record.write_state(aside, self._state())
        self.record.write_row(self.step, self.record.row())
        folder.commit_checkpoint(self.step)
        if is_best:
            folder.mark_best(self.step)
        folder.prune(self.config.train.keep_checkpoints)
        self.answers.ledger.clear()

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "cursor": asdict(self.prompts.state()),
            "next_group": self.next_group,
            **self.learning.state(),
            "best": self.best.state(),
            "policy": self.fingerprint,
            "algorithm": self.config.algorithm.name,
            "trained": trained_models(self.config),
        }

    async def restore(self, step: int) -> None:
        """Continue from the checkpoint of a step."""
        state = self.record.read_state(step)
        folder = self.record.folder.checkpoint(step)
        self.prompts.restore(Cursor(**state["cursor"]))
        self.step, self.next_group = state["step"], state["next_group"]
        await self.learning.restore(state, step)
        self.best.restore(state["best"])
        if self.best.step == step:  # the run may have been killed before it was marked
            self.record.folder.mark_best(step)
        await self.roles.policy.load(folder / "policy")
        if self.roles.critic is not None:
            await self.roles.critic.load(folder / "critic")
        logger.info("resumed from the checkpoint of step %d", step)

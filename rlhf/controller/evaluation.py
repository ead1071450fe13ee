"""Scores of held-out prompts under the current weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf.config.root import Config
from rlhf.controller.answers import Answers, request_for
from rlhf.controller.learning import Signals
from rlhf.controller.record import RunRecord
from rlhf.controller.sampling import group_samples, values_by_reward
from rlhf.errors import RunError
from rlhf.rewards.scoring import describe
from rlhf.roles import RewardRole, SampleSelection, ScoredGroup
from rlhf.tracking.reductions import Mean, Reduction
from rlhf.tracking.samples import samples_path
from rlhf.types import Prompt, Sampling


async def evaluate(
    sets: Mapping[str, Sequence[Prompt]],
    config: Config,
    answers: Answers,
    reward: RewardRole,
    record: RunRecord,
    *,
    step: int,
) -> None:
    """Answer and score every set by the weights of a step; the values stand in its row, the responses in its samples.

    RunError if a reward failed and reward_policy.on_error is fail, or if a set has no score at all.
    """
    assert config.rollouts is not None
    settings = config.eval
    sampling = Sampling(
        max_new_tokens=config.rollouts.max_new_tokens, temperature=settings.temperature, stop=config.rollouts.stop
    )
    selections: list[SampleSelection] = []
    with record.stage("eval", role="rollout"):
        offset = 0
        for name, prompts in sets.items():
            requests = [
                request_for(
                    prompt,
                    group_id=-1 - offset - index,  # no place in the prompt stream
                    first_sequence_id=index * settings.samples_per_prompt,
                    samples=settings.samples_per_prompt,
                    run_seed=config.run.seed,
                )
                for index, prompt in enumerate(prompts)
            ]
            offset += len(requests)
            groups = await answers.to(requests, sampling, step=step, version=step)
            failed = [group for group in groups if group.scores.errors]
            if failed and config.reward_policy.on_error == "fail":
                answers.ledger.forget_failures()
                raise RunError(f"eval {name}, step {step}: {describe(failed[0].scores.errors)}")
            sound = [group for group in groups if not group.scores.errors]
            if not sound:
                answers.ledger.forget_failures()
                raise RunError(f"eval {name}, step {step}: no response could be scored; see errors.jsonl")
            record.add(_metrics(name, sound))
            selections += group_samples(sound, Signals(), split=name, most=None)
        await reward.write_samples(samples_path(record.folder.path, step), selections)


def _metrics(name: str, groups: Sequence[ScoredGroup]) -> dict[str, Reduction]:
    infos = [info for scored in groups for info in scored.group.infos]
    scores = [score for scored in groups for score in scored.scores.scores]
    return {
        f"eval/{name}/score": Mean.of(scores),
        f"eval/{name}/truncated": Mean.of([float(info.finish_reason == "length") for info in infos]),
        f"eval/{name}/response_tokens": Mean.of([float(info.num_response_tokens) for info in infos]),
        **{f"eval/{name}/{reward}": Mean.of(values) for reward, values in values_by_reward(groups).items()},
    }

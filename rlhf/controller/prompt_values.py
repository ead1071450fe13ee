"""Estimate the value of each training prompt before the first step, from scored responses of the policy at that time.

    prompts -> rollouts -> rewards -> values

The values are part of a checkpoint, since later weights cannot sample the same responses.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence

from rlhf.algorithms.online import OnlineAlgorithm
from rlhf.config.schema.root import Config
from rlhf.controller.rollout_scorer import RolloutScorer, request_for
from rlhf.controller.training_scores import TrainingScores
from rlhf.errors import RunError
from rlhf.rewards.scoring import describe_errors
from rlhf.types import Prompt, Sampling

logger = logging.getLogger(__name__)
FIRST_GROUP = -1_000_000_001  # group ids go down from here: neither in the prompt stream nor an evaluation's
PROMPTS_AT_ONCE = 256  # bounds the responses in memory
BEFORE_TRAINING = -1  # used as epoch, so that the seeds differ from the seeds of training


async def estimate_values(
    prompts: Sequence[Prompt], config: Config, algorithm: OnlineAlgorithm, scorer: RolloutScorer, sampling: Sampling
) -> dict[int, float]:
    """Return the value of each prompt by id, with the engines' weights of version 0. RunError: a reward failed."""
    assert config.rollouts is not None
    samples, scores = config.algorithm.num_value_samples, TrainingScores(config.rewards)
    logger.info("the values of %d prompts are estimated, from %d responses to each", len(prompts), samples)
    values: dict[int, float] = {}
    group_ids = itertools.count(FIRST_GROUP, -1)
    with scorer.record.stage("prompt_values"):
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            chunk = prompts[start : start + PROMPTS_AT_ONCE]
            requests = [
                request_for(
                    prompt,
                    group_id=next(group_ids),
                    first_sequence_id=index * samples,
                    samples=samples,
                    run_seed=config.run.seed,
                    epoch=BEFORE_TRAINING,
                    temperature=prompt.temperature,
                )
                for index, prompt in enumerate(chunk)
            ]
            groups = await scorer.score_all(requests, sampling, step=0, version=0, split="prompt_values")
            if failed := [scored.scores.errors for scored in groups if scored.scores.errors]:
                scorer.forget_untrained()
                raise RunError(
                    f"algorithm {config.algorithm.name}: the value of a prompt needs the scores of all its responses: "
                    f"{describe_errors(failed[0])}. Correct the reward, or give rewards.NAME.on_error the score of "
                    "such a response."
                )
            groups = scores.shaped(groups, algorithm, max_new_tokens=config.rollouts.max_response_tokens)
            outcomes = scores.outcomes(groups, [score for scored in groups for score in scored.scores.scores])
            chunk_values = algorithm.prompt_values(outcomes).tolist()
            values |= {prompt.prompt_id: value for prompt, value in zip(chunk, chunk_values, strict=True)}
    return values

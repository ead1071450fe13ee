"""`rlhf play`: an environment of a configuration, played by hand in the policy's place, without a model or Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from actors.rollout.tool_calls import VllmToolCalls
from rlhf.config.files.load import LoadedConfig
from rlhf.controller.rollout_scorer import request_for
from rlhf.data.tokenization import Continuation
from rlhf.errors import RunError, UserError
from rlhf.preflight.inputs import StageInputs, load_inputs
from rlhf.preflight.training_data import OnlineInputs
from rlhf.process.stopping import run_async
from rlhf.rollouts.environments.conversations import Conversations, EnvironmentSpec
from rlhf.rollouts.records.spans import Played, Sampled
from rlhf.tracking import logs
from rlhf.types import Prompt, Sampling
from rlhf.vision.keys import decoded


class Left(Exception):
    """The player gave no further turn."""


def play_conversation(loaded: LoadedConfig, turns: Iterable[str], show: Callable[[str], None], *, row: int) -> Played:
    """Play one conversation. `turns` stand for the policy's turns; `show` gets the policy's input, token for token.

    row: the prompt's place among the training data, from 1. UserError if the configuration has no environment or the
    data no such row. RunError if the environment failed. Left if the turns end before the conversation does.
    """
    logs.configure("WARNING")
    stages = [(stage, stage.inputs) for stage in load_inputs(loaded) if isinstance(stage, StageInputs)]
    online = [(stage, inputs) for stage, inputs in stages if isinstance(inputs, OnlineInputs)]
    playable = [(*pair, spec) for pair in online if isinstance(spec := pair[1].environment, EnvironmentSpec)]
    if not playable:
        raise UserError(f"{loaded.source}: has no rollouts.environment to play. Name one.")
    stage, inputs, environment = playable[-1]
    prompt = next((prompt for prompt in inputs.prompts if prompt.prompt_id == row - 1), None)
    if prompt is None:
        last = inputs.prompts[-1].prompt_id + 1
        why = "which was skipped" if 1 <= row < last else f"and the training data has the rows 1 to {last}"
        raise UserError(f"--row: is {row}, {why}")
    return run_async(_play(stage, environment, prompt, iter(turns), show))


async def _play(
    stage: StageInputs, environment: EnvironmentSpec, prompt: Prompt, turns: Iterable[str], show: Callable[[str], None]
) -> Played:
    rollouts, tokenizer = stage.config.rollouts, stage.tokenizer
    assert rollouts is not None
    continuation, lines = Continuation(tokenizer), iter(turns)
    shown = 0  # tokens

    async def draw(group_id: int, tokens: tuple[int, ...], seed: int, sampling: Sampling, end: int | None) -> Sampled:
        nonlocal shown
        show(decoded(tokens[shown:], tokenizer))
        text = await asyncio.to_thread(next, lines, None)
        if text is None:
            raise Left
        before = decoded(tokens[-1:], tokenizer)
        ids = [*continuation.encode([(before, text)])[0], tokenizer.eos_token_id if end is None else end]
        ids = ids[: sampling.max_new_tokens]
        shown = len(tokens) + len(ids)
        return Sampled(token_ids=tuple(ids), logprobs=(0.0,) * len(ids), versions=(0,) * len(ids), finish_reason="stop")

    conversations = Conversations(environment, tokenizer, draw, images=stage.images)
    description = await conversations.start()
    try:
        if description.tools:
            conversations.parser = VllmToolCalls(environment.tool_parser, tokenizer, description.tools)
        seed = stage.config.run.seed
        request = request_for(prompt, group_id=0, first_sequence_id=0, samples=1, run_seed=seed)
        (played,) = await conversations.play(
            request, request.drawn_by(Sampling(max_new_tokens=rollouts.max_new_tokens))
        )
    finally:
        await conversations.stop()
    if played.error is not None:
        raise RunError(f"{environment.key}: {played.error.kind}: {played.error.message}")
    return played

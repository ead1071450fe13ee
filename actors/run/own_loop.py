"""Start the roles of an online run for a loop of the user, and end the roles with the loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from actors.cluster.actor_locations import listed_in
from actors.cluster.connect import OWN_RAY, connected
from actors.cluster.waiting import within
from actors.run.run_record import recording
from actors.run.train import SHOWN_ONLINE, online_roles, refuse_overwrite, write_final
from rlhf.config.files.load import LoadedConfig
from rlhf.config.schema.root import Config
from rlhf.config.schema.stages import result_of, run_folder
from rlhf.controller.own_loop import OwnLoop
from rlhf.data.row import Row
from rlhf.errors import UserError
from rlhf.preflight.inputs import StageInputs, load_inputs
from rlhf.preflight.prompts import prompts_of_rows
from rlhf.preflight.run_folder import check_folders, refuse_other_checkpoint
from rlhf.preflight.sources import reading_of
from rlhf.preflight.start import Start
from rlhf.preflight.training_data import OnlineInputs
from rlhf.roles import Ref
from rlhf.tracking.run_folder.folder import remove_run
from rlhf.types import Prompt


@asynccontextmanager
async def own_loop(loaded: LoadedConfig, start: Start) -> AsyncIterator[OwnLoop]:
    """Start the roles, and yield the loop. The roles end with the block, at once after an exception."""
    written = _only_run(loaded)
    if start.overwrite:
        refuse_overwrite(loaded)
    else:
        check_folders([written], start)
    if start.resume and result_of(written).exists():
        raise UserError(f"rlhf.start: the run in {run_folder(written)} is finished. Choose another run.name.")
    with loaded.located():
        (stage,) = await asyncio.to_thread(load_inputs, loaded, trackers=start.trackers)
    assert isinstance(stage, StageInputs)
    assert isinstance(stage.inputs, OnlineInputs)
    if start.resume:
        refuse_other_checkpoint(stage, step=None)
    if start.overwrite:
        remove_run(run_folder(written))
    inputs, stage = stage.inputs, replace(stage, config=_without_snapshots(stage.config))
    shown: Any = {"steps": stage.config.train.num_steps, "show": SHOWN_ONLINE, "mode": start.mode}
    with (
        connected(written.cluster),
        recording(written, resume=start.resume, trackers=start.trackers, **shown) as (record, step),
        listed_in(record.folder.processes),
    ):
        async with online_roles(stage, inputs, record) as (controller, _):
            if step is not None:
                await controller.restore(step)
            loop = OwnLoop(
                controller,
                tokenizer=stage.tokenizer,
                fetch=partial(_fetch, limit_s=stage.config.cluster.call_timeout_s),
                read=partial(read_prompt, stage, inputs),
                write_final=partial(write_final, controller),
                written=written,
            )
            try:
                await loop.begin()
                yield loop
            except (asyncio.CancelledError, KeyboardInterrupt):
                OWN_RAY.kill()  # Ctrl-C may have ended its daemons, which would not answer
                raise
            finally:
                loop.end()


def _only_run(loaded: LoadedConfig) -> Config:
    """Return a single run's configuration with rollouts in turns. UserError: the configuration does not fit a loop."""
    if loaded.is_pipeline or not loaded.runs:
        raise UserError(f"rlhf.start: {loaded.source} is a pipeline. Give the configuration of one run.")
    (config,) = loaded.runs.values()
    if config.rollouts is None:
        name = config.algorithm.short_name
        raise UserError(f"rlhf.start: {name} samples no responses. Give an online algorithm, such as grpo.")
    modes = {
        "rollouts.max_staleness": config.rollouts.max_staleness > 0,
        "rollouts.weight_updates": config.rollouts.weight_updates == "in_flight",
        "train.streamed": config.train.streamed,
    }
    if chosen := [key for key, is_set in modes.items() if is_set]:
        raise UserError(f"rlhf.start: your loop decides when responses are sampled; remove {', '.join(chosen)}.")
    return config


def _without_snapshots(config: Config) -> Config:
    """Return the configuration of ranks without a restart: only the user's loop can repeat the lost work."""
    restarts = config.cluster.restarts.model_copy(update={"gang": 0})
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"restarts": restarts})})


async def _fetch(ref: Ref[Any], *, limit_s: float) -> Any:
    reference: Any = ref
    return await within(asyncio.wrap_future(reference.future()), limit_s)


def read_prompt(stage: StageInputs, inputs: OnlineInputs, columns: Mapping[str, Any], prompt_id: int) -> Prompt:
    """Return a prompt of the user's loop, read as a row of data.train. UserError: the prompt does not fit."""
    if inputs.environment is not None:
        raise UserError("prompt: the environment or the agent takes rows of the data. Use loop.prompts() instead.")
    reading = replace(reading_of(stage.config), images=stage.images)
    row = Row(file="rlhf.start", line=1, columns=columns)
    loaded, _ = prompts_of_rows(
        [row], "prompt", stage.tokenizer, reading, rewards=inputs.rewards, environment=None, first_id=prompt_id
    )
    longest = max(len(prompt.token_ids) for prompt in inputs.prompts)
    if not loaded.items or len(loaded.items[0].token_ids) > longest:
        raise UserError(
            f"prompt: the prompt is longer than the longest prompt of data.train, which has {longest} tokens. The "
            "engines and ranks have room for this length only. Shorten the prompt, or add a longer prompt to "
            "data.train."
        )
    return loaded.items[0]

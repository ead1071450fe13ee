"""Run a checked configuration: inputs, cluster, actors, controller, final model. The loops are in rlhf.controller."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray

from actors.cluster.actor_locations import draining_node, listed_in
from actors.cluster.connect import connected
from actors.cluster.node_metrics import Nodes
from actors.cluster.placement import Placement, reserve
from actors.cluster.preemption import run_loop
from actors.cluster.shared_memory import refuse_small_shared_memory
from actors.cluster.waiting import put
from actors.roles.build import RunContext, build_roles
from actors.roles.gang import PolicyGang
from actors.roles.group import Stoppable, ending, ending_rebuilds
from actors.roles.teacher import TeacherWorkers
from actors.roles.worker_pools import RewardWorkers
from actors.run.engine_pool import ENGINE_POOL
from actors.run.evaluate import run_evaluation
from actors.run.run_record import recording
from rlhf.config.derive import needs_reference_logprobs, reads_teacher_heads, ships_adapter, teachers
from rlhf.config.files.dump import dump_masked_yaml
from rlhf.config.files.load import LoadedConfig
from rlhf.config.placement_plan import PlacementPlan, plan_placement
from rlhf.config.schema.stages import MergeStage, Stage, result_of, run_folder
from rlhf.config.void_restarts import void_restarts
from rlhf.controller.learning import OnlineRoles
from rlhf.controller.loop import sparing_loaded_objects
from rlhf.controller.offline import OfflineController
from rlhf.controller.online import OnlineController
from rlhf.controller.record import RunRecord
from rlhf.controller.supervisor import Supervisor
from rlhf.data.images import RowImages
from rlhf.data.preferences import PreferencePair
from rlhf.errors import RunError, UserError, prefix_errors
from rlhf.merging.merge import checked_sources, write_merge
from rlhf.models.files.publish import push_folder
from rlhf.preflight.inputs import CheckedStage, StageInputs, load_inputs
from rlhf.preflight.merge import with_local_models
from rlhf.preflight.run_folder import check_folders, continue_from, refuse_other_checkpoint, stream_of
from rlhf.preflight.sources import tracked_run
from rlhf.preflight.start import Start
from rlhf.preflight.training_data import OfflineInputs, OfflineRow, OnlineInputs, collated, translated_sets
from rlhf.process.driver_parent import unrecorded_deaths
from rlhf.process.stopping import StopRequest, current_request, run_async
from rlhf.rewards.scoring import fingerprint, has_judges
from rlhf.tracking import logs
from rlhf.tracking.notebook import in_notebook
from rlhf.tracking.run_folder.atomic import write_atomic
from rlhf.tracking.run_folder.errors import ErrorRecord
from rlhf.tracking.run_folder.folder import images_folder, refuse_to_overwrite, remove_run
from rlhf.viewing.model_card import write_model_card
from rlhf.vision.sight import exchanged_images
from rlhf.vision.store import PassingImages

logger = logging.getLogger(__name__)
SHOWN_ONLINE: tuple[str, ...] = (
    *("rewards/score/mean", "experience/kl_ref/mean", "experience/kl_teacher/mean", "rollouts/response_tokens/mean"),
    "time/step_s",
)
SHOWN_OFFLINE = (
    "update/loss/mean",
    "update/token_accuracy/mean",
    "preference/accuracy/mean",
    "update/lr",
    "time/step_s",
)


def launch(loaded: LoadedConfig, start: Start) -> None:
    """Run all stages, or with `start.resume` the unfinished stages. Return when the last result is written.

    Preempted: a signal came before the end (see rlhf.process.stopping). Finished work is kept.
    """
    logs.configure()
    if start.until is not None and (loaded.is_pipeline or not loaded.runs):
        raise UserError(
            f"--until: {loaded.source} is a pipeline, and each stage counts its own steps. Leave the option out."
        )
    if start.overwrite:
        refuse_overwrite(loaded)
    else:
        check_folders(loaded.stages.values(), start)
    left = [stage for stage in loaded.stages.values() if not (start.resume and result_of(stage).exists())]
    if not left:
        logger.info("%s is finished: nothing is left to do", loaded.name)
        return
    logger.info("%s: checking models, data and rewards", loaded.name)
    with loaded.located():
        stages = load_inputs(loaded, trackers=start.trackers)
    for stage in stages:
        if isinstance(stage, StageInputs):
            steps = stage.config.train.num_steps
            if start.until is not None and not 1 <= start.until <= steps:
                raise UserError(f"--until: is {start.until}, but the run has only the steps 1 to {steps} (train.steps)")
            if start.resume:
                refuse_other_checkpoint(stage, step=start.from_step if stage.written == left[0] else None)
    for written in left if start.overwrite else ():
        remove_run(run_folder(written))
    _run_stages(loaded, stages, left, start)


def refuse_overwrite(loaded: LoadedConfig) -> None:
    """Raise UserError unless every stage's folder is free, or holds a removable run."""
    for stage in loaded.stages.values():
        if stage.run.mirror is not None:
            raise UserError(f"--overwrite: {stage.run.name} has a copy in run.mirror. Choose another run.name.")
        refuse_to_overwrite(run_folder(stage))


def _run_stages(loaded: LoadedConfig, stages: Sequence[CheckedStage], left: Sequence[Stage], start: Start) -> None:
    request = current_request() or StopRequest()
    clusters = [stage.cluster for stage in left if not isinstance(stage, MergeStage)]
    with connected(clusters[0]) if clusters else nullcontext():
        if start.from_step is not None:
            request.raise_if_stopped()
            continue_from(left[0], start.from_step)
        for stage in stages:
            written = stage.written if isinstance(stage, StageInputs) else stage
            if written not in left:
                logger.info("%s is finished: %s", written.run.name, result_of(written))
                continue
            request.raise_if_stopped()
            if loaded.is_pipeline:
                logger.info("stage %s begins", written.run.name)
            if isinstance(stage, StageInputs):
                run_async(_run_stage(stage, request, start))
            elif isinstance(stage, MergeStage):
                _run_merge(stage, loaded.folder, start)
            else:
                run_evaluation(stage, loaded, start)
    if loaded.is_pipeline:
        write_atomic(loaded.folder / "config.resolved.yaml", dump_masked_yaml(loaded))


def _run_merge(stage: MergeStage, pipeline: Path, start: Start) -> None:
    config = with_local_models(stage, pipeline)
    with recording(stage, resume=start.resume) as (record, _):
        folder = record.folder
        with prefix_errors(f"stages.{folder.path.name}"), record.timeline.span("merge"):
            sources = checked_sources(config, folder.final, key="run.dir")
            quiet = start.mode != "auto" or in_notebook()
            write_merge(config, sources, folder.begin_final(), out=folder.final, quiet=quiet)
        folder.commit_final()
    logger.info("%s: merged %s by %s", stage.run.name, ", ".join(config.models), config.method)


async def _run_stage(stage: StageInputs, request: StopRequest, start: Start) -> None:
    inputs = stage.inputs
    show, metric = (SHOWN_ONLINE, "score") if isinstance(inputs, OnlineInputs) else (SHOWN_OFFLINE, "loss")
    show += tuple(f"eval/{name}/{metric}" for name in list(inputs.eval_sets)[:1])
    steps = stage.config.train.num_steps
    shown: Any = {"steps": steps, "show": show, "mode": start.mode}
    passed: Any = {"callbacks": start.callbacks, "trackers": start.trackers}
    with recording(stage.written, resume=start.resume, **shown, **passed) as (record, step):
        for row in inputs.unusable if step is None else ():
            unusable = ErrorRecord(step=0, stage="data", kind="unusable", message=row.reason, source=row.place)
            record.tracker.log_error(unusable)
        record.images = _passing_images(stage, record)
        running = (
            online_roles(stage, inputs, record) if isinstance(inputs, OnlineInputs) else _offline(stage, inputs, record)
        )
        with listed_in(record.folder.processes):
            run = tracked_run(stage.written, done_steps=step)
            async with running as (controller, placement), record.callbacks.following(run):
                await _carry_out(controller, request, step=step, until=start.until, nodes=placement.nodes)


def _passing_images(stage: StageInputs, record: RunRecord) -> PassingImages | None:
    """Return the remover of images of conversations. None: no conversation has images, or carried-over responses
    may need their images after any number of steps."""
    rollouts = stage.config.rollouts
    if stage.images is None or rollouts is None or rollouts.carry_over:
        return None
    if rollouts.environment is None and rollouts.agent is None:
        return None
    # The batch of a step is requested at most max_staleness steps earlier; one step more is for late repetitions.
    return PassingImages(images_folder(record.folder.path), steps=rollouts.max_staleness + 1)


@asynccontextmanager
async def _offline(
    stage: StageInputs, inputs: OfflineInputs, record: RunRecord
) -> AsyncIterator[tuple[OfflineController, Placement]]:
    """Start the roles of a run on fixed data, and yield the controller. The roles end with the block."""
    config = stage.config
    placement = await reserve(config)
    nodes = record.nodes = Nodes(placement)
    groups: list[Stoppable] = [nodes]
    async with ending(groups, placement.release, heartbeat_timeout_s=config.cluster.heartbeat_timeout_s):
        await refuse_small_shared_memory(config, placement)
        supervisor = Supervisor(config.cluster.restarts, record, placement.plan.slots)
        length = inputs.longest_sequence
        context = RunContext(
            config=config,
            placement=placement,
            longest_sequence=length,
            supervisor=supervisor,
            images=images_folder(record.folder.path),
        )
        roles = build_roles(context, groups)
        record.progress.stage(f"starting {_names(placement.plan)}")
        await asyncio.gather(*[g.start(deadline_s=config.cluster.start_timeout_s) for g in roles.values()])
        policy, teacher = roles[PolicyGang.role], roles.get(TeacherWorkers.role)
        sets = (inputs.rows, *inputs.eval_sets.values())
        data = [put(collated(config, rows)) for rows in sets]
        await policy.load_data(data)
        if teacher is not None:
            lengths = [[row.longest for row in rows] for rows in sets]
            translations = [put(rows) for rows in translated_sets(sets)]
            await teacher.load_data(data, lengths=lengths, translations=translations)
            await _give_heads(stage, policy, teacher)
        controller = OfflineController(
            config,
            policy,
            record,
            train_set=inputs.rows,
            rows=stream_of(stage),
            deliver=lambda rows: policy.load_train_set(
                put(collated(config, cast("Sequence[OfflineRow]", rows), others=inputs.rows))
            ),
            eval_sets=inputs.eval_sets,
            policy_fingerprint=policy.fingerprint,
            supervisor=supervisor,
            teacher=teacher,
        )
        seeing = [ids for row in inputs.rows if min(ids := _tokens(row)) < 0]
        if seeing and not config.algorithm.has_scalar_head:
            own = min(seeing, key=len)
            await controller.check_sight(own, _with_other_images(own, stage.images))
        if needs_reference_logprobs(config):
            await controller.provide_reference()
        async with ending_rebuilds(roles.values()):
            yield controller, placement


async def _give_heads(stage: StageInputs, policy: Any, teacher: Any) -> None:
    """Send the vocabulary heads of teachers that return hidden states to the policy's ranks."""
    for name in teachers(stage.config) if reads_teacher_heads(stage.config) else ():
        await policy.take_teacher(name, await teacher.head(name))


@asynccontextmanager
async def online_roles(
    stage: StageInputs, inputs: OnlineInputs, record: RunRecord
) -> AsyncIterator[tuple[OnlineController, Placement]]:
    """Start the roles of a run with rollouts, and yield the controller. The roles end with the block."""
    config = stage.config
    lease = await ENGINE_POOL.lease(
        config,
        max_model_len=inputs.max_model_len,
        spool=record.folder.spool,
        environment=inputs.environment,
        images=None if stage.images is None else stage.images.reader.place,
    )
    nodes = record.nodes = Nodes(lease.placement)
    groups: list[Stoppable] = [nodes]
    async with ending(groups, lease.release, heartbeat_timeout_s=config.cluster.heartbeat_timeout_s):
        await refuse_small_shared_memory(config, lease.placement)
        supervisor = Supervisor(config.cluster.restarts, record, plan_placement(config).slots)
        context = RunContext(
            config=config,
            placement=lease.placement,
            longest_sequence=inputs.max_model_len,
            supervisor=supervisor,
            images=images_folder(record.folder.path),
            rewards=inputs.rewards,
            judgements=record.folder.judgements() if has_judges(inputs.rewards) else None,
            tokenizer_class=None if config.policy.trust_remote_code else type(stage.tokenizer),
        )
        roles = build_roles(context, groups)
        lease.engines.supervisor, lease.engines.placement = supervisor, lease.placement
        groups.append(lease)
        record.progress.stage(f"starting {_names(plan_placement(config))}")
        await lease.start_with(list(roles.values()), config.cluster)
        policy, teacher = roles[PolicyGang.role], roles.get(TeacherWorkers.role)
        if teacher is not None:
            await _give_heads(stage, policy, teacher)
        assert lease.engines.sync is not None
        for sentence in void_restarts(config, lease.engines.sync.method):
            logger.warning("%s", sentence)
        adapter = record.folder.scratch / "adapter" if ships_adapter(config) else None
        await lease.engines.connect(policy, adapter=adapter)
        controller = OnlineController(
            config,
            OnlineRoles(rollout=lease.engines, **roles),
            record,
            prompts=stream_of(stage),
            eval_sets=inputs.eval_sets,
            suites=inputs.suites,
            marking=inputs.marking,
            probe_ids=inputs.probe_ids,
            other_ids=_with_other_images(inputs.probe_ids, stage.images),
            policy_fingerprint=policy.fingerprint,
            supervisor=supervisor,
            rewards_fingerprint=fingerprint(inputs.rewards, model=repr(roles[RewardWorkers.role].settings.model)),
            environment_fingerprint="" if inputs.environment is None else inputs.environment.fingerprint(),
            code=inputs.code(),
        )
        async with ending_rebuilds([*roles.values(), lease.engines]):
            yield controller, lease.placement


def _with_other_images(token_ids: Sequence[int], images: RowImages | None) -> tuple[int, ...]:
    """Return the token ids with other images, or nothing without an image or a text behind."""
    if images is None or min(token_ids) >= 0 or token_ids[-1] < 0:
        return ()
    return exchanged_images(token_ids, images.reader.store)


def _tokens(row: OfflineRow) -> tuple[int, ...]:
    """Return the tokens of a row's prompt and answer, or of a pair's chosen answer."""
    return row.examples[0].token_ids if isinstance(row, PreferencePair) else row.token_ids


def _names(plan: PlacementPlan) -> str:
    return ", ".join(f"{len(slots)} {role}" for role, slots in plan.slots.items())


async def _carry_out(
    controller: OnlineController | OfflineController,
    request: StopRequest,
    *,
    step: int | None,
    until: int | None,
    nodes: Callable[[], Collection[str]],
) -> None:
    """Run the loop from the checkpoint of `step`, if any. Write final/ at the end, but not at `until`."""
    if step is not None:
        await controller.restore(step)
    controller.supervisor.continue_after(unrecorded_deaths())
    here = ray.get_runtime_context().get_node_id()  # draining this node ends the driver, even if no worker is there
    with sparing_loaded_objects():
        is_done = await run_loop(
            controller.run(until=until),
            controller.notice,
            request,
            grace_s=controller.config.train.preemption_grace_s,
            call_timeout_s=controller.config.cluster.call_timeout_s,
            draining_node=partial(draining_node, lambda: {*nodes(), here}),
        )
    if is_done:
        await write_final(controller)


async def write_final(controller: OnlineController | OfflineController) -> Path:
    """Write the model to final/ in the run's folder, and return that folder."""
    folder, aside = controller.record.folder, await controller.export()
    if not any(aside.iterdir()):
        raise RunError(
            f"export: the ranks wrote no model to {aside} that the driver can see. run.dir must be a folder that all "
            "nodes share."
        )
    run = controller.config.run
    write_model_card(aside, controller.config, run=folder.path, step=None)
    final = folder.commit_final()
    if run.repository is not None:
        push_folder(final, run.repository)
    return final

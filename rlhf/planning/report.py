"""Write `rlhf plan` as text: the summary of each run, then memory, fit, time and cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rlhf.config.derive import eval_sets, loaded_models, max_sequence_tokens, with_steps
from rlhf.config.files.load import LoadedConfig
from rlhf.config.nodes import Node, parse_cluster
from rlhf.config.placement_plan import plan_placement
from rlhf.config.schema.root import Config
from rlhf.config.schema.stages import MergeStage, final_folder
from rlhf.config.schema.stages import Stage as RunStage
from rlhf.errors import UserError
from rlhf.models.packed.row_layout import RowLayout, expected_layout
from rlhf.models.support import untested_model
from rlhf.planning.fitting import places, remedies, this_machine
from rlhf.planning.footprints import Sizes, checkpoint_sizes, footprints
from rlhf.planning.lengths import Lengths, parse_lengths
from rlhf.planning.memory import GIB, Footprint, snapshot_sizes
from rlhf.planning.rates import DEFAULT_GPU, Stage, rates
from rlhf.planning.schedules import schedule_of, schedules
from rlhf.planning.shapes import find_config
from rlhf.planning.simulate import simulate
from rlhf.planning.summary import format_table, refuse_misfit, stage_text
from rlhf.planning.system import Schedule
from rlhf.planning.time import sync_stage, system_of, training_stages
from rlhf.role_table import ROLE_ORDER


def render_plan(
    loaded: LoadedConfig, *, cluster: str | None = None, shapes: Path | None = None, lengths: str | None = None
) -> str:
    """Return the plan as text. Raise UserError if a run wants more CPUs or GPUs than the described cluster has."""
    if shapes is not None and not shapes.is_dir():
        raise UserError(f"--shapes {shapes}: is not a folder. Name a folder that holds OWNER/NAME/config.json")
    nodes = None if cluster is None else parse_cluster(cluster)
    refuse_misfit(loaded, nodes, cluster)
    sizes = sizes_of(loaded, nodes, shapes)
    parts = []
    for written in loaded.stages.values():
        stage, epochs = with_counted_steps(written)
        text = stage_text(stage, None if nodes is None else [node.resources for node in nodes]) + epochs
        if isinstance(stage, Config):
            text = "\n\n".join([text, *_estimates(stage, sizes, nodes, lengths)])
        parts.append(text)
    return "\n\n".join(parts) + "\n"


def with_counted_steps(stage: RunStage) -> tuple[RunStage, str]:
    """Return the stage with steps in place of epochs, and a sentence with the steps, if the data is on this machine."""
    if not isinstance(stage, Config) or stage.train.epochs is None:
        return stage, ""
    from rlhf.planning.rows import rows_here  # imports the data set readers

    rows = rows_here(stage)
    if rows is None:
        return stage, ""
    counted = with_steps(stage, rows)
    text = f"train.epochs {stage.train.epochs:g} of {rows:,} rows: {counted.train.steps:,} steps, if no row is left out"
    return counted, f"\n\n  {text}"


def sizes_of(loaded: LoadedConfig, nodes: Sequence[Node] | None, shapes: Path | None) -> Sizes:
    made: dict[str, str] = {}
    for stage in loaded.stages.values():
        if isinstance(stage, Config):
            made[str(final_folder(stage))] = stage.policy.model
        elif isinstance(stage, MergeStage):
            made[str(final_folder(stage))] = next(iter(stage.merge.models.values())).model  # all have the same size
    gpus = [node.gpu_memory_gib for node in nodes or () if node.gpus and node.gpu_memory_gib is not None]
    return Sizes(shapes=shapes, made=made, gpu_memory_gib=min(gpus) if gpus else None)


def _estimates(config: Config, sizes: Sizes, nodes: Sequence[Node] | None, lengths: str | None) -> list[str]:
    rows = _row_layouts(config, sizes)
    try:
        processes = footprints(config, sizes)
        return [
            *rows,
            "memory, GiB, at most (micro-batches full), of one process or GPU each\n" + _terms(processes),
            *_fits(config, sizes, processes, nodes),
            _disk(config, sizes),
            *_times(config, sizes, nodes, response_lengths(config, lengths, sizes)),
        ]
    except UserError as error:
        return [*rows, f"no estimate of memory and time: {error}."]


def _row_layouts(config: Config, sizes: Sizes) -> list[str]:
    """Name the models of untested types or with an unusual packing of sequences, if the config.json is at hand."""
    lines, untested = [], []
    for section, _, model in loaded_models(config):
        stored = find_config((sizes.made or {}).get(model.model, model.model), shapes=sizes.shapes)
        if stored is None:
            continue
        if (sentence := untested_model(stored[0])) is not None:
            untested.append(f"{section}: {sentence}")
        layout, reason = expected_layout(stored[0])
        if layout is RowLayout.ONE_BY_ONE:
            lines.append(f"  {section}: sequences are computed one by one, which is slower: {reason}")
        elif layout is RowLayout.PACKED:
            lines.append(f"  {section}: responses to a prompt do not share its tokens: {reason}")
    return [*untested, "\n".join(["layout of sequences", *lines])] if lines else untested


def _terms(processes: Sequence[Footprint]) -> str:
    rows = [["role", "", "GiB", "how"]]
    for process in sorted(processes, key=lambda f: ROLE_ORDER.index(f.role)):
        where = "GPU + host" if process.on_gpu else "resident"
        both = f"{_gib(process.of('device'))} + {_gib(process.rss)}" if process.on_gpu else _gib(process.rss)
        rows.append([f"{process.role} * {process.workers}", where, both, ""])
        for term in filter(lambda t: t.nbytes > 0.0, process.terms):
            place = {"device": "", "host": " (host)" if process.on_gpu else "", "shared": " (shared)"}[term.place]
            rows.append(["", term.name + place, _gib(term.nbytes), term.how])
    return format_table(rows)


def _fits(config: Config, sizes: Sizes, processes: Sequence[Footprint], nodes: Sequence[Node] | None) -> list[str]:
    placement = plan_placement(config)
    local = nodes is None and config.cluster.device == "cpu" and config.cluster.address is None
    if local:
        nodes = [this_machine(cpus=placement.total("CPU"))]
    if nodes is None:
        hint = "what fits is shown with --cluster, such as '2*cpu=96,gpu=8,type=h100,mem=1000'"
        ranks = {process.role: process.workers for process in processes}
        total = sum(size * ranks[role] for role, size in snapshot_sizes(processes).items())
        return [hint, f"snapshots of all ranks: {_gib(total)} GiB of /dev/shm"] if total else [hint]

    def here(text: str) -> str:
        return text.replace("host of node 0", "this machine").replace(" of node 0", "") if local else text

    rows = [["place", "wanted", "of", "", "contents"]]
    is_tight, fixes = False, []
    for place in places(config, placement, processes, nodes):
        word = {True: "fits", False: "DOES NOT FIT", None: "memory unknown"}[place.fits]
        is_tight |= place.fits is False
        room = "-" if place.room is None else _gib(place.room)
        if place.fits is False and place.fix:
            fixes.append(f"  {here(place.where)}: {place.fix}")
        rows.append([here(place.where), _gib(place.wanted), room, word, place.parts])
    text = ["memory by place, GiB\n" + format_table(rows), *fixes]
    if is_tight:
        roles = [process.role for process in processes if process.role != "reward"]
        lines = "\n".join(f"  {line}" for line in remedies(config, sizes, nodes, roles))
        text.append("changes that reduce memory, mildest first for each role\n" + here(lines))
    return text


def _disk(config: Config, sizes: Sizes) -> str:
    """Return the largest disk use of checkpoints: all that stay, plus a checkpoint being written."""
    parts = checkpoint_sizes(config, sizes)
    checkpoint, best = sum(parts.values()), bool(eval_sets(config) or config.eval.suites)
    count = config.train.keep_checkpoints + best + 1
    kept = f"the newest {config.train.keep_checkpoints}{', the best' if best else ''} and one that is being written"
    roles = " + ".join(f"{role} {_gib(size)}" for role, size in parts.items())
    return f"disk of the run folder, GiB\n  checkpoints  {_gib(count * checkpoint)}  {count} * ({roles}): {kept}"


def response_lengths(config: Config, text: str | None, sizes: Sizes) -> Lengths:
    """Return the lengths of responses as given, or a distribution with half the limit as the mean.

    Without rollouts, return the lengths of training sequences: estimated from local rows, or half the limit.
    """
    from rlhf.planning.rows import image_tokens_here, mean_tokens_here  # imports the data set readers

    sees = bool(sizes.of(config.policy.model).tower.parameters)
    images = image_tokens_here(config, sizes) if sees else 0.0
    if config.rollouts is None:
        longest, mean = max_sequence_tokens(config), mean_tokens_here(config)
        mean = longest / 2 if mean is None else min(mean + (images or 0.0), float(longest))
        return Lengths(most=longest, mean=mean, image_tokens=images)
    most = config.rollouts.max_response_tokens
    lengths = Lengths(most=most, mean=most / 2, sigma=0.6) if text is None else parse_lengths(text, most=most)
    return replace(lengths, image_tokens=images)


def _times(config: Config, sizes: Sizes, nodes: Sequence[Node] | None, lengths: Lengths) -> list[str]:
    stages = training_stages(config, sizes, nodes, lengths)
    title = f"time of a step, estimated ({_assumed(config, nodes, lengths)})\n"
    if config.rollouts is None:
        return [title + _stages(config, stages, nodes)]
    system, sync = system_of(config, sizes, nodes, lengths), sync_stage(config, sizes, nodes)
    schedule = schedule_of(config)
    bounds = (0,) if system.colocated else sorted({0, 1, 2, config.rollouts.max_staleness})
    outcomes = {compared: simulate(system, compared) for compared in schedules(config, bounds)}
    seconds = outcomes[Schedule()].step_s - sum(stage.seconds for stage in stages) - sync.seconds
    engine_step = f"{system.base_s * 1e3:,.3g} ms + {system.each_s * 1e6:,.3g} us a sequence"
    how = f"until the slowest response; an engine's step {engine_step}"
    stages = [Stage("rollouts", max(seconds, 0.0), how), *stages, sync]
    if schedule != Schedule():
        overlap = outcomes[schedule].step_s - sum(stage.seconds for stage in stages)
        stages.append(Stage("overlap", overlap, f"{schedule}, compared with {Schedule()}"))
    text = title + _stages(config, stages, nodes)
    if system.colocated:
        return [text, "schedules: rollouts and training share their devices, so they can only take turns"]
    rows = [["schedule", "s / step", "engines busy", "trainers busy", "mean lag"]]
    for compared, outcome in outcomes.items():
        busy = [f"{outcome.engines_busy:.0%}", f"{outcome.trainer_busy:.0%}"]
        rows.append([str(compared), f"{outcome.step_s:,.4g}", *busy, f"{outcome.lag:.2f}"])
    return [text, f"schedules; this run: {schedule}\n" + format_table(rows)]


def _assumed(config: Config, nodes: Sequence[Node] | None, lengths: Lengths) -> str:
    speed = rates(config, nodes, role="policy")
    has_type = any(node.kind for node in nodes or ())
    guess = "" if has_type or config.cluster.device == "cpu" else f", assumed: --cluster says no type={DEFAULT_GPU}"
    responses = f"; responses {lengths}" if config.algorithm.is_online else f"; sequences of {lengths.mean:,.0f} tokens"
    unknown = "; prompts that are only images, which cannot be read here" if lengths.image_tokens is None else ""
    images = f"; {lengths.image_tokens:,.0f} tokens of images in a prompt" if lengths.image_tokens else unknown
    return f"on {speed.name}{guess}{responses}{images}"


def _stages(config: Config, stages: Sequence[Stage], nodes: Sequence[Node] | None) -> str:
    total, steps = sum(stage.seconds for stage in stages), config.train.steps
    unit = "GPU" if config.cluster.device == "cuda" else "CPU"
    rates_per_hour = {f"{unit} hours": plan_placement(config).total(unit)}
    if nodes is not None and all(node.price is not None for node in nodes):
        rates_per_hour["price"] = sum(node.price or 0.0 for node in nodes)
    rows = [["stage", "s", "share", *rates_per_hour, "how"]]
    summed = [Stage("step", total, "" if steps is None else f"* {steps:,} steps")]
    if steps is not None:
        how = f"{total * steps / 3600:,.3g} hours, without start and evaluations"
        summed.append(Stage("whole run", total * steps, how))
    for stage in [*stages, *summed]:
        share = "" if stage.name == "whole run" else f"{stage.seconds / total:.0%}"
        costs = [f"{stage.seconds * rate / 3600:,.4g}" for rate in rates_per_hour.values()]
        rows.append([stage.name, f"{stage.seconds:,.4g}", share, *costs, stage.how])
    return format_table(rows)


def _gib(nbytes: float) -> str:
    return f"{nbytes / GIB:,.2f}"

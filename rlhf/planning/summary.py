"""Write the first part of `rlhf plan`: derived numbers and placement of each run, without models or data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import get_args

import yaml

from rlhf.algorithms.online_config import FollowedReferenceConfig
from rlhf.algorithms.privileged import SelfTeaching
from rlhf.config import derive
from rlhf.config.files.load import LoadedConfig
from rlhf.config.nodes import Node
from rlhf.config.placement_plan import PlacementPlan, assign_nodes, plan_placement
from rlhf.config.schema.cluster import ClusterConfig, EngineRange
from rlhf.config.schema.data import DataSource, TaskConfig
from rlhf.config.schema.evaluate import EvaluateConfig, EvaluationStage
from rlhf.config.schema.merge import MergeConfig, in_effect
from rlhf.config.schema.rewards import RewardConfig
from rlhf.config.schema.rollouts import RolloutsConfig
from rlhf.config.schema.root import Config
from rlhf.config.schema.stages import MergeStage, Stage, run_folder
from rlhf.config.void_restarts import void_restarts
from rlhf.data.presets import presets
from rlhf.errors import UserError
from rlhf.objectives.costs import Dtype, fast_dtype, why_dtype
from rlhf.planning.schedules import correction_in_force, schedule_of
from rlhf.role_table import ROLE_ORDER, Role


def refuse_misfit(loaded: LoadedConfig, nodes: Sequence[Node] | None, cluster: str | None) -> None:
    """Raise UserError if a run wants more CPUs or GPUs than the nodes described as `cluster` have."""
    for stage in loaded.stages.values():
        if isinstance(stage, MergeStage) or nodes is None:
            continue
        placement, available = plan_placement(stage), [node.resources for node in nodes]
        if assign_nodes(placement.bundles, available) is None:
            rows = [["", "CPU", "GPU"]]
            for name, resources in (("wanted", placement.bundles), ("available", available)):
                rows.append([name, *(_number(sum(r.get(key, 0.0) for r in resources)) for key in ("CPU", "GPU"))])
            raise UserError(
                f"{stage.run.name} does not fit the cluster {cluster!r}.\n{format_table(rows)}\n"
                f"Bundles: {_sizes(placement)}. Lower cluster.roles.*.workers, .engines or .cpus, let roles share "
                "bundles with colocate_with, or use a larger cluster."
            )


def stage_text(stage: Stage, nodes: Sequence[Mapping[str, float]] | None) -> str:
    if isinstance(stage, MergeStage):
        kind, tables = "merge", [list(_merge_facts(stage.merge))]
    elif isinstance(stage, EvaluationStage):
        kind, placement, config = "evaluate", plan_placement(stage), stage.evaluate
        models: dict[Role, str] = {
            "policy": config.model,
            "rollout": config.model if config.against is None else f"{config.model}, then {config.against}",
            "reward": ", ".join(one.model for one in config.reward.models.values()) if config.reward else "functions",
        }
        roles = [role for role in ROLE_ORDER if role in stage.needs]
        role_rows = _role_rows(roles, stage.cluster, placement, models)
        tables = [list(_evaluation_facts(config)), role_rows, _bundles(placement, nodes)]
    else:
        kind, placement, derived = stage.algorithm.name, plan_placement(stage), derive.derive(stage)
        tables = [list(_facts(stage, derived)), _roles(stage, derived, placement), _bundles(placement, nodes)]
    return "\n\n".join([f"{stage.run.name}: {kind} -> {run_folder(stage)}", *map(format_table, tables)])


def _merge_facts(config: MergeConfig) -> Iterator[list[str]]:
    effective = in_effect(config)
    inputs = effective.pop("models")
    yield ["result", f"one {config.output}, made by this process; no worker is started"]
    for key, value in effective.items():
        if value is not None and key != "output":
            yield [key, str(value)]
    for name, settings in inputs.items():
        keys = ", ".join(f"{key} {value:g}" for key, value in settings.items() if key != "model")
        yield [f"model {name}", config.models[name].model + (f" ({keys})" if keys else "")]


def _evaluation_facts(config: EvaluateConfig) -> Iterator[list[str]]:
    yield ["model", config.model]
    if config.against is not None:
        yield ["against", config.against]
    if config.suites:
        yield ["suites", ", ".join(config.suites)]
    if config.data is None:
        return
    yield ["data", _named(config.sets)]
    if not config.rewards:
        yield ["measured", "completions: loss, perplexity and token accuracy; nothing is sampled"]
        return
    how = "greedy" if config.temperature == 0.0 else f"at temperature {config.temperature:g}"
    most, environment = f"{config.max_new_tokens:,} tokens", config.environment
    if environment is not None:
        most = f"{environment.max_turns} turns of {most} with {environment.name}"
    if config.agent is not None:
        most = f"{config.agent.max_calls} calls of {most} by {config.agent.name}"
    yield ["responses", f"{config.samples_per_prompt} to a prompt, {how}, of at most {most}"]
    yield ["rewards", ", ".join(config.rewards)]


def _facts(config: Config, derived: derive.Derived) -> Iterator[list[str]]:
    train, rollouts = config.train, config.rollouts
    updates = "1 optimizer step" if derived.updates_per_step == 1 else f"{derived.updates_per_step} optimizer steps"
    if rollouts is None:
        yield ["sequences a step", f"{train.sequences_per_update}: {updates}"]
        fate = {"error": "is an error", "skip": "is left out", "cut": "loses its end"}[config.data.too_long]
        most = f"a sequence of more than {derived.longest_sequence:,} {fate}"
    else:
        yield from _rollout_facts(config, rollouts, derived, updates)
        most = f"a step at most {derived.tokens_per_step:,}"
    ranks, shared = derived.data_parallel_ranks, config.cluster.roles.policy.sequence_parallel
    on = f" on {ranks} ranks" if ranks > 1 else ""
    if shared > 1:
        on = f" on {shared} ranks together" if ranks == 1 else f" on each {shared} of {ranks * shared} ranks"
    yield ["micro-batch", f"at most {train.max_tokens_per_microbatch:,} tokens{on}; {most}"]
    set_keys = config.algorithm.model_dump(mode="json", exclude_defaults=True)
    yield ["algorithm", yaml.safe_dump(set_keys, default_flow_style=True, sort_keys=False, width=math.inf).strip()]
    yield ["whole run", _whole_run(config)]
    yield ["dtype", _dtypes(config)]
    yield ["learning rate", _learning_rate(config)]
    yield ["training data", _mixture(config)]
    if config.rewards:
        yield ["rewards", ", ".join(f"{name} ({_reward(reward)})" for name, reward in config.rewards.items())]
    sets, suites = derive.eval_sets(config), config.eval.suites
    if sets or suites:
        first = "before training, " if config.eval.at_start else ""
        named = ", ".join([*([_named(sets)] if sets else ()), *suites])
        yield ["evaluation", f"{first}every {config.eval.every} steps and at the end: {named}"]
    if derive.needs_reference_logprobs(config):
        where = config.run.dir / "reference_logprobs"
        yield ["reference", f"the policy before training: computed once, then taken from {where}"]
    if rollouts is not None:
        if not config.algorithm.distils_rollouts:
            yield ["reference", _reference(config, derived)]
        if config.algorithm.has_teacher or isinstance(config.algorithm, SelfTeaching):
            yield _teacher(config)
        yield ["weight sync", _sync(config)]
    transport = derive.weight_sync(config.cluster, one_host=config.cluster.address is None).method
    yield from (["restarts", sentence] for sentence in void_restarts(config, transport))
    kept = f"the newest {train.keep_checkpoints} and the best kept"
    yield ["checkpoints", f"every {train.checkpoint_every} steps; {kept}"]


def _rollout_facts(
    config: Config, rollouts: RolloutsConfig, derived: derive.Derived, updates: str
) -> Iterator[list[str]]:
    prompts, samples, environment = rollouts.prompts_per_step, rollouts.samples_per_prompt, rollouts.environment
    text = f"{prompts} prompts * {samples} samples = {derived.sequences_per_step}"
    if config.algorithm.wants_greedy:
        text += f", and {prompts} greedy ones"
    if config.algorithm.num_value_samples:
        text += f", after {config.algorithm.num_value_samples} to each prompt of data.train before the first step"
    if derive.leaves_out(config):
        text += f", of which at most {derive.trained_per_prompt(config, rollouts)[0]} a prompt are trained on"
    if rollouts.oversample > 1.0:
        text += f", the first of {derive.prompts_at_once(prompts, rollouts)} prompts to be answered"
    if rollouts.carry_over:
        text += ", while the others are continued in the next step"
    if rollouts.dynamic_sampling is not None:
        most = math.floor(prompts * rollouts.dynamic_sampling.max_filtered_fraction)
        text += f", in place of at most {most} prompts that are filtered"
    yield ["responses a step", text]
    rows = "pairs" if config.algorithm.kind == "sampled_pairs" else "sequences"
    passes = f"{config.train.epochs_per_batch} passes" if config.train.epochs_per_batch > 1 else "1 pass"
    batch = f"{derived.rows_per_step} / {config.train.sequences_per_update} {rows} = {derived.updates_per_batch}"
    yield ["updates a step", f"{batch}, {passes}: {updates}"]
    longest = f"{config.data.max_prompt_tokens} prompt + {rollouts.max_new_tokens} new"
    longest += f" = {derived.longest_sequence} tokens"
    if environment is not None:
        turns = f"{environment.max_turns} turns of {rollouts.max_new_tokens}"
        longest = f"{derived.longest_sequence} tokens of a conversation with {environment.name}, at most {turns}"
    if rollouts.agent is not None:
        calls = f"{rollouts.agent.max_calls} calls of {rollouts.max_new_tokens} a session"
        longest = f"{derived.longest_sequence} tokens of a call by {rollouts.agent.name}, at most {calls}"
    yield ["longest sequence", longest]
    yield ["schedule", f"{schedule_of(config)}; correction of old responses: {correction_in_force(config, rollouts)}"]
    if config.policy.support_replay:
        yield [
            "sampler",
            "top_k, top_p and min_p as in rollouts; the policy's probabilities are among the kept tokens too",
        ]


def _whole_run(config: Config) -> str:
    train = config.train
    if train.steps is None:
        return f"{train.epochs:g} epochs: how many steps that is follows from data.train, which is not here"
    text = f"{train.steps} steps: {derive.policy_optimizer_steps(config)} optimizer steps of the policy"
    return f"{text}, {derive.critic_optimizer_steps(config)} of the critic" if config.algorithm.has_critic else text


def _dtypes(config: Config) -> str:
    """Name the data type of each model of the run, and what a CPU without a written dtype would get."""
    models = derive.loaded_models(config)
    names = {dtype: [role for role, _, model in models if model.dtype == dtype] for dtype in get_args(Dtype)}
    text = "; ".join(f"{dtype} ({', '.join(dict.fromkeys(roles))})" for dtype, roles in names.items() if roles)
    device = config.cluster.device
    return f"{text}. The default here is {fast_dtype(device)}, {why_dtype(device)}"


def _learning_rate(config: Config) -> str:
    train = config.train
    shape = {
        "cosine_with_restarts": f"cosine with restarts, {train.lr_cycles} times",
        "wsd": f"constant, then linear in the last {train.lr_decay_ratio:.0%} of the optimizer steps",
    }.get(train.lr_schedule, train.lr_schedule)
    text = f"{train.lr:g}, {shape}"
    if train.lr_schedule != "constant":
        text += f" to {train.lr * train.min_lr_ratio:g}"
    if train.warmup_ratio:
        return f"{text} after a warm-up of {train.warmup_ratio:.0%} of the optimizer steps"
    return text + (f" after {train.warmup_steps} optimizer steps of warm-up" if train.warmup_steps else "")


def _reference(config: Config, derived: derive.Derived) -> str:
    if derived.reference == "none":
        return "none: algorithm.kl.coef is 0"
    if derived.reference == "workers":
        every = config.algorithm.reference_every if isinstance(config.algorithm, FollowedReferenceConfig) else None
        renewed = "" if every is None else f"; after every {every} steps the policy as it is then, from the run folder"
        return f"{derive.reference_model(config).model} in workers of its own{renewed}"
    adapter = "its LoRA adapter off" if config.policy.adapter is None else "policy.adapter as it is now"
    return f"the policy with {adapter}: no second model"


def _teacher(config: Config) -> list[str]:
    section = config.algorithm
    if isinstance(section, SelfTeaching):
        every = f" of every {section.teacher_every} steps" if section.teacher_every else " before training"
        weights = {
            "current": "as it is at the start of the step",
            "average": f"as a moving average (rate {section.teacher_rate:g})",
            "snapshot": f"as a snapshot{every}",
        }
        return ["teacher", f"the policy with algorithm.privileged, {weights[section.teacher_weights]}: no second model"]
    says = "its distributions at" if config.algorithm.reads_teacher_states else "its log-probabilities of"
    top_k = getattr(config.algorithm, "top_k", None)
    if top_k is not None:
        says = f"its {top_k} likeliest tokens at"
    by = f", by column {derive.teacher_column(config)}" if derive.has_named_teachers(config) else ""
    return ["teacher", f"{_teacher_names(config)}{by}: {says} the sampled tokens"]


def _teacher_names(config: Config) -> str:
    named, names = derive.has_named_teachers(config), []
    for name, teacher in derive.teachers(config).items():
        model = teacher.model if teacher.url is None else f"{teacher.model} at {teacher.url}"
        names.append(f"{name} ({model})" if named else model)
    return ", ".join(names) or "none"


def _sync(config: Config) -> str:
    one_host, lora = config.cluster.address is None, config.policy.lora
    choice, other = (derive.weight_sync(config.cluster, one_host=at_once) for at_once in (one_host, not one_host))
    text = f"{choice.method}: {choice.why}"
    if not one_host and other != choice and not config.cluster.roles.rollout.is_elastic:
        text += f"; {other.method} if they are placed on one"
    if lora is None:
        return text
    alone, why = (
        "only the adapter, as a folder",
        derive.merged_because(lora, vision=config.policy.vision_lr is not None),
    )
    if config.policy.adapter is not None:
        return f"{alone}, unless vLLM does not support this kind of adapter; then merged into the weights, by {text}"
    return alone if why is None else f"all weights, the adapter merged ({why}), by {text}"


def _roles(config: Config, derived: derive.Derived, placement: PlacementPlan) -> list[list[str]]:
    models = {role: derive.ROLE_USES[role].model(config) for role in derived.needs}
    without = "functions" if config.rewards else "none"
    names = {
        role: without if model is None else ", ".join(one.model for one in derive.held_models(config, role).values())
        for role, model in models.items()
    }
    for role in derive.served_roles(config) & names.keys():
        names[role] = _teacher_names(config)
    return _role_rows(derived.needs, config.cluster, placement, names)


def _role_rows(
    roles: Sequence[Role], cluster: ClusterConfig, placement: PlacementPlan, models: Mapping[Role, str]
) -> list[list[str]]:
    rows = [["role", "workers", "bundles", "CPUs each", "GPUs each", "threads", "model"]]
    for role in roles:
        section = getattr(cluster.roles, role)
        slots, engines = placement.slots[role], getattr(section, "engines", None)
        workers = f"{engines.min}-{engines.max}" if isinstance(engines, EngineRange) else str(len(slots))
        threads = "-" if cluster.device == "cuda" else str(section.threads)
        cpus, gpus = min(s.cpus for s in slots), min(s.gpus for s in slots)
        places = _ranges(sorted({s.bundle for s in slots}))
        rows.append([role, workers, places, _number(cpus), _number(gpus), threads, models[role]])
    return rows


def _bundles(placement: PlacementPlan, nodes: Sequence[Mapping[str, float]] | None) -> list[list[str]]:
    """Return a row for each run of equal bundles."""
    where = assign_nodes(placement.bundles, nodes) if nodes is not None else None
    rows: list[list[str]] = []
    for index, bundle in enumerate(placement.bundles):
        tenants = [role for role, slots in placement.slots.items() if any(s.bundle == index for s in slots)]
        row = [_number(bundle["CPU"]), _number(bundle.get("GPU", 0.0)), ", ".join(tenants)]
        rows.append(row if nodes is None else [*row, f"node {where[index]}" if where else "no room"])
    header = ["bundle", "CPU", "GPU", "roles", *(["where"] if nodes is not None else [])]
    runs = [(row, [index for index, _ in run]) for row, run in groupby(enumerate(rows), key=lambda pair: pair[1])]
    total = ["all", _number(placement.total("CPU")), _number(placement.total("GPU"))]
    return [header, *([_ranges(indices), *row] for row, indices in runs), total]


def _sizes(placement: PlacementPlan) -> str:
    gpus = [f" + {_number(bundle['GPU'])} GPU" if "GPU" in bundle else "" for bundle in placement.bundles]
    sizes = [f"{_number(bundle['CPU'])} CPU{gpu}" for bundle, gpu in zip(placement.bundles, gpus, strict=True)]
    return ", ".join(f"{sizes.count(size)} of {size}" for size in dict.fromkeys(sizes))


def _named(sets: Mapping[str, DataSource]) -> str:
    return ", ".join(f"{name} ({_source(source)})" for name, source in sets.items())


def _mixture(config: Config) -> str:
    sets = derive.train_sets(config).values()
    total = sum(weighted.weight for weighted in sets)
    shares = [f"{weighted.weight / total:.1%} " if len(sets) > 1 else "" for weighted in sets]
    return ", ".join(share + _source(weighted.source) for share, weighted in zip(shares, sets, strict=True))


def _reward(reward: RewardConfig) -> str:
    source = reward.function or reward.role or reward.url or "environment"
    only = "; ".join(f"{name} {', '.join(map(str, values))}" for name, values in reward.only.items())
    return f"{source}, only {only}" if only else source


def _source(source: DataSource) -> str:
    if isinstance(source, TaskConfig):
        return f"{source.size} rows of {source.task}"
    if isinstance(source, str):
        return source
    of = f"{source.size} rows of " if source.size else ""
    known = presets()[source.preset]
    return (
        f"{of}preset {source.preset}, split {known.split(source.split)} of {source.path or known.hub} ({known.license})"
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Format numbers as ranges: 0, 1, 2, 5 become `0-2, 5`."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    return "\n".join("  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=False)).rstrip() for row in rows)

"""Write the first part of `rlhf plan`: derived numbers and placement of each run, before anything starts.

Memory and time follow from other modules of rlhf.planning. Neither models nor data nor Ray are needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby

from rlhf.algorithms.online_config import FollowedReferenceConfig
from rlhf.config.derive import (
    ROLE_USES,
    Derived,
    critic_optimizer_steps,
    derive,
    eval_sets,
    leaves_out,
    merged_because,
    needs_reference_logprobs,
    policy_optimizer_steps,
    prompts_at_once,
    reference_model,
    train_sets,
    trained_per_prompt,
    weight_sync,
)
from rlhf.config.files.load import LoadedConfig
from rlhf.config.nodes import Node
from rlhf.config.placement_plan import Seating, assign_nodes, seat
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.data import DataSource, TaskConfig
from rlhf.config.schema.evaluate import EvaluationStage
from rlhf.config.schema.merge import MergeConfig, in_effect
from rlhf.config.schema.rollouts import RolloutsConfig
from rlhf.config.schema.root import Config
from rlhf.config.schema.stages import MergeStage, Stage, run_folder
from rlhf.errors import UserError
from rlhf.role_table import ROLE_ORDER, Role


def refuse_misfit(loaded: LoadedConfig, nodes: Sequence[Node] | None, cluster: str | None) -> None:
    """Raise UserError if a run wants more CPUs or GPUs than the nodes described as `cluster` have."""
    for stage in loaded.stages.values():
        if isinstance(stage, MergeStage) or nodes is None:
            continue
        seating, available = seat(stage), [node.resources for node in nodes]
        if assign_nodes(seating.bundles, available) is None:
            rows = [["", "CPU", "GPU"]]
            for name, resources in (("wanted", seating.bundles), ("available", available)):
                rows.append([name, *(_number(sum(r.get(key, 0.0) for r in resources)) for key in ("CPU", "GPU"))])
            raise UserError(
                f"{stage.run.name} does not fit the cluster {cluster!r}.\n{format_table(rows)}\n"
                f"Bundles: {_sizes(seating)}. Lower cluster.roles.*.workers, .engines or .cpus, let roles share "
                "bundles with colocate_with, or use a larger cluster."
            )


def stage_text(stage: Stage, nodes: Sequence[Mapping[str, float]] | None) -> str:
    """Describe a stage's derived numbers and placement."""
    if isinstance(stage, Config):
        return _run(stage, nodes)
    name = "merge" if isinstance(stage, MergeStage) else "evaluate"
    parts = [f"{stage.run.name}: {name} -> {run_folder(stage)}"]
    if isinstance(stage, MergeStage):
        return "\n\n".join([*parts, format_table(_merge_facts(stage.merge))])
    seating = seat(stage)
    model = stage.evaluate.model
    reward = stage.evaluate.reward
    models: dict[Role, str] = {
        "policy": model,
        "rollout": model if stage.evaluate.against is None else f"{model}, then {stage.evaluate.against}",
        "reward": reward.model if reward else "functions",
    }
    roles = [role for role in ROLE_ORDER if role in stage.needs]
    parts += [format_table(_evaluation_facts(stage)), format_table(_role_rows(roles, stage.cluster, seating, models))]
    return "\n\n".join([*parts, format_table(_bundles(seating, nodes))])


def _merge_facts(config: MergeConfig) -> list[list[str]]:
    shown = in_effect(config)
    inner = {
        name: {k: v for k, v in settings.items() if k != "model"} for name, settings in shown.pop("models").items()
    }
    facts = [["result", f"one {config.output}, made by this process; no worker is started"]]
    facts += [[key, str(value)] for key, value in shown.items() if value is not None and key != "output"]
    for name, model in config.models.items():
        keys = ", ".join(f"{key} {value:g}" for key, value in inner[name].items())
        facts.append([f"model {name}", model.model + (f" ({keys})" if keys else "")])
    return facts


def _evaluation_facts(stage: EvaluationStage) -> list[list[str]]:
    config = stage.evaluate
    sets = config.data if isinstance(config.data, dict) else {"heldout": config.data}
    facts = [["model", config.model]]
    if config.against is not None:
        facts.append(["against", config.against])
    facts.append(["data", ", ".join(f"{name} ({_source(source)})" for name, source in sets.items())])
    if not config.rewards:
        return [*facts, ["measured", "completions: loss, perplexity and token accuracy; nothing is sampled"]]
    count = config.samples_per_prompt
    how = "greedy" if config.temperature == 0.0 else f"at temperature {config.temperature:g}"
    played = config.environment
    most = f"at most {config.max_new_tokens:,} tokens"
    if played is not None:
        most = f"at most {played.max_turns} turns of {config.max_new_tokens:,} tokens with {played.name}"
    answers = f"{count} to a prompt, {how}, of {most}"
    return [*facts, ["responses", answers], ["rewards", ", ".join(config.rewards)]]


def _run(config: Config, nodes: Sequence[Mapping[str, float]] | None) -> str:
    derived, seating = derive(config), seat(config)
    parts = [
        f"{config.run.name}: {config.algorithm.name} -> {run_folder(config)}",
        format_table(_facts(config, derived)),
        format_table(_roles(config, derived, seating)),
        format_table(_bundles(seating, nodes)),
    ]
    return "\n\n".join(parts)


def _greedy(config: Config) -> str:
    """Describe extra greedy responses and the limit on trained responses."""
    assert config.rollouts is not None
    greedy = f", and {config.rollouts.prompts_per_step} greedy ones" if config.algorithm.wants_greedy else ""
    most = trained_per_prompt(config, config.rollouts)
    return greedy + (f", of which at most {most} a prompt are trained on" if leaves_out(config) else "")


def _facts(config: Config, derived: Derived) -> list[list[str]]:
    train, rollouts = config.train, config.rollouts
    updates = "1 optimizer step" if derived.updates_per_step == 1 else f"{derived.updates_per_step} optimizer steps"
    sequences, per_update = derived.sequences_per_step, train.sequences_per_update
    rows = "pairs" if config.algorithm.kind == "sampled_pairs" else "sequences"
    facts: list[list[str]] = []
    if rollouts is None:
        facts.append(["sequences a step", f"{per_update}: {updates}"])
    else:
        prompts, samples = rollouts.prompts_per_step, rollouts.samples_per_prompt
        prompt, new, environment = config.data.max_prompt_tokens, rollouts.max_new_tokens, rollouts.environment
        if environment is None:
            longest = f"{prompt} prompt + {new} new = {derived.longest_sequence} tokens"
        else:
            turns = f"{environment.max_turns} turns of {new}"
            longest = f"{derived.longest_sequence} tokens of a conversation with {environment.name}, at most {turns}"
        passes = f"{train.epochs_per_batch} passes" if train.epochs_per_batch > 1 else "1 pass"
        facts += [
            [
                "responses a step",
                f"{prompts} prompts * {samples} samples = {sequences}{_greedy(config)}{_extra(rollouts)}",
            ],
            [
                "updates a step",
                f"{derived.rows_per_step} / {per_update} {rows} = {derived.updates_per_batch}, {passes}: {updates}",
            ],
            ["longest sequence", longest],
        ]
    ranks, shared = derived.data_parallel_ranks, config.cluster.roles.policy.sequence_parallel
    on = f" on {ranks} ranks" if ranks > 1 else ""
    if shared > 1:
        on = f" on {shared} ranks together" if ranks == 1 else f" on each {shared} of {ranks * shared} ranks"
    fate = {"error": "is an error", "skip": "is left out", "cut": "loses its end"}[config.data.too_long]
    longer = f"a sequence of more than {derived.longest_sequence:,} {fate}"
    most = f"a step at most {derived.tokens_per_step:,}" if rollouts else longer
    facts += [
        ["micro-batch", f"at most {train.max_tokens_per_microbatch:,} tokens{on}; {most}"],
        ["whole run", _whole_run(config)],
        ["learning rate", _learning_rate(config)],
        ["training data", _mixture(config)],
    ]
    sets = eval_sets(config)
    if sets:
        first = "before training, " if config.eval.at_start else ""
        named = ", ".join(f"{name} ({_source(source)})" for name, source in sets.items())
        facts.append(["evaluation", f"{first}every {config.eval.every} steps and at the end: {named}"])
    if needs_reference_logprobs(config):
        where = config.run.dir / "reference_logprobs"
        facts.append(["reference", f"the policy before training: computed once, then taken from {where}"])
    if rollouts is not None:
        facts.append(_teacher(config) if config.algorithm.has_teacher else ["reference", _reference(config, derived)])
        facts.append(["weight sync", _sync(config)])
    facts.append(
        ["checkpoints", f"every {train.checkpoint_every} steps; the newest {train.keep_checkpoints} and the best kept"]
    )
    return facts


def _extra(rollouts: RolloutsConfig) -> str:
    """Describe extra prompts from oversampling, and filtered prompts."""
    text = ""
    if rollouts.oversample > 1.0:
        text += f", the first of {prompts_at_once(rollouts.prompts_per_step, rollouts)} prompts to be answered"
    if rollouts.dynamic_sampling is not None:
        most = math.floor(rollouts.prompts_per_step * rollouts.dynamic_sampling.max_filtered_fraction)
        text += f", in place of at most {most} prompts that are filtered"
    return text


def _whole_run(config: Config) -> str:
    train = config.train
    if train.steps is None:
        return f"{train.epochs:g} epochs: how many steps that is follows from data.train, which is not here"
    text = f"{train.steps} steps: {policy_optimizer_steps(config)} optimizer steps of the policy"
    return f"{text}, {critic_optimizer_steps(config)} of the critic" if config.algorithm.has_critic else text


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


def _reference(config: Config, derived: Derived) -> str:
    return {
        "none": "none: algorithm.kl.coef is 0",
        "adapter off": "the policy with its LoRA adapter off: no second model"
        if config.policy.adapter is None
        else "the policy with policy.adapter as it is now: no second model",
        "workers": f"{reference_model(config).model} in workers of its own{_renewed(config)}",
    }[derived.reference]


def _teacher(config: Config) -> list[str]:
    says = "its distributions at" if config.algorithm.reads_teacher_states else "its log-probabilities of"
    return ["teacher", f"{config.teacher.model if config.teacher else 'none'}: {says} the sampled tokens"]


def _renewed(config: Config) -> str:
    every = config.algorithm.reference_every if isinstance(config.algorithm, FollowedReferenceConfig) else None
    return "" if every is None else f"; after every {every} steps the policy as it is then, from the run folder"


def _sync(config: Config) -> str:
    cluster = config.cluster
    one_host = cluster.address is None
    choice = weight_sync(cluster, one_host=one_host)
    text = f"{choice.method}: {choice.why}"
    other = weight_sync(cluster, one_host=not one_host)
    if not one_host and other != choice:
        text += f"; {other.method} if they are placed on one"
    lora = config.policy.lora
    if lora is None:
        return text
    alone = "the adapter alone, as a folder"
    if config.policy.adapter is not None:
        return f"{alone}, unless it is of a kind that vLLM does not take; then merged, by {text}"
    why = merged_because(lora)
    return alone if why is None else f"all weights, the adapter merged ({why}), by {text}"


def _roles(config: Config, derived: Derived, seating: Seating) -> list[list[str]]:
    models = {role: ROLE_USES[role].model(config) for role in derived.needs}
    without = "functions" if config.rewards else "none"
    names = {role: without if model is None else model.model for role, model in models.items()}
    return _role_rows(derived.needs, config.cluster, seating, names)


def _role_rows(
    roles: Sequence[Role], cluster: ClusterConfig, seating: Seating, models: Mapping[Role, str]
) -> list[list[str]]:
    rows = [["role", "workers", "bundles", "CPUs each", "GPUs each", "threads", "model"]]
    for role in roles:
        section = getattr(cluster.roles, role)
        seats = seating.seats[role]
        threads = "-" if cluster.device == "cuda" else str(section.threads)
        cpus, gpus = min(s.cpus for s in seats), min(s.gpus for s in seats)
        places = _ranges(sorted({s.bundle for s in seats}))
        rows.append([role, str(len(seats)), places, _number(cpus), _number(gpus), threads, models[role]])
    return rows


def _bundles(seating: Seating, nodes: Sequence[Mapping[str, float]] | None) -> list[list[str]]:
    """Return one row for each run of equal bundles."""
    where = assign_nodes(seating.bundles, nodes) if nodes is not None else None
    rows: list[list[str]] = []
    for index, bundle in enumerate(seating.bundles):
        tenants = [role for role, seats in seating.seats.items() if any(s.bundle == index for s in seats)]
        row = [_number(bundle["CPU"]), _number(bundle.get("GPU", 0.0)), ", ".join(tenants)]
        rows.append(row if nodes is None else [*row, f"node {where[index]}" if where else "no room"])
    header = ["bundle", "CPU", "GPU", "roles", *(["where"] if nodes is not None else [])]
    runs = [(row, [index for index, _ in run]) for row, run in groupby(enumerate(rows), key=lambda pair: pair[1])]
    total = ["all", _number(seating.total("CPU")), _number(seating.total("GPU"))]
    return [header, *([_ranges(indices), *row] for row, indices in runs), total]


def _sizes(seating: Seating) -> str:
    sizes = [
        f"{_number(b['CPU'])} CPU" + (f" + {_number(b['GPU'])} GPU" if "GPU" in b else "") for b in seating.bundles
    ]
    return ", ".join(f"{sizes.count(size)} of {size}" for size in dict.fromkeys(sizes))


def _mixture(config: Config) -> str:
    sets = train_sets(config).values()
    total = sum(weighted.weight for weighted in sets)
    shown = [
        (f"{weighted.weight / total:.1%} " if len(sets) > 1 else "") + _source(weighted.source) for weighted in sets
    ]
    return ", ".join(shown)


def _source(source: DataSource) -> str:
    return f"{source.size} rows of {source.task}" if isinstance(source, TaskConfig) else source


def _ranges(numbers: Sequence[int]) -> str:
    """Format numbers as ranges: 0, 1, 2, 5 become `0-2, 5`."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of cells as aligned columns."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    return "\n".join("  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=False)).rstrip() for row in rows)

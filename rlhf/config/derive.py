"""Derive roles, batch arithmetic, placement and weight sync from one run's configuration, as `rlhf plan` shows.

The functions are pure. `derive` takes a configuration checked by rlhf.config.validation.run; the functions above
`derive` take any configuration. Facts that depend only on the algorithm are in rlhf.algorithms.algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.algorithms.algorithm import Kind
from rlhf.algorithms.distillation import TaughtConfig
from rlhf.algorithms.online_config import OnlineConfig
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.data import DataSource, PresetConfig, WeightedSource
from rlhf.config.schema.model import (
    CriticConfig,
    LoraConfig,
    ModelConfig,
    PolicyConfig,
    ReferenceConfig,
    RewardModelConfig,
    TeacherConfig,
)
from rlhf.config.schema.rewards import drops
from rlhf.config.schema.rollouts import RolloutsConfig
from rlhf.config.schema.root import Config
from rlhf.config.schema.train import TrainConfig
from rlhf.config.transports import Transport
from rlhf.config.yaml_tree import Key
from rlhf.data.presets import PresetSource, presets
from rlhf.data.tasks import TaskSource
from rlhf.data.templates import ChatTemplate
from rlhf.role_table import GUESTS_OF_ENGINES, MODEL_SECTIONS, ROLE_ORDER, Role
from rlhf.types import ONLY_TEACHER

MAX_ENGINE_RANK = 512  # largest adapter rank in vLLM


def adapter_options(lora: LoraConfig, *, vision_lr: float | None = None) -> dict[str, Any]:
    """Return the arguments of rlhf.models.adapters.lora.add_lora, without options for training and quantization."""
    return {**lora.model_dump(exclude={"lora_plus_ratio", "quantize"}), "vision": vision_lr is not None}


def needs_reference_logprobs(config: Config) -> bool:
    """Return whether the losses of a run without rollouts use log-probabilities from before training."""
    return config.algorithm.uses_reference and not config.algorithm.is_online


def trained_per_prompt(config: Config, rollouts: RolloutsConfig) -> tuple[int, str]:
    """Return the most responses per prompt that are trained on, and the configuration key with this number."""
    limit, keep = config.algorithm.most_kept, rollouts.keep_per_prompt
    if limit is not None:
        return limit, "algorithm.keep"
    if keep is not None:
        return keep.count, "rollouts.keep_per_prompt.count"
    return rollouts.samples_per_prompt, "rollouts.samples_per_prompt"


def leaves_out(config: Config) -> bool:
    """Return whether some responses with advantages are not trained on."""
    keeps = config.rollouts is not None and config.rollouts.keep_per_prompt is not None
    masks = isinstance(config.algorithm, OnlineConfig) and config.algorithm.mask_truncated
    return keeps or masks or config.algorithm.most_kept is not None


def uses_reference(config: Config) -> bool:
    """Return whether a reference's log-probabilities of the rollouts enter the objective."""
    return config.algorithm.uses_reference and config.algorithm.is_online


def reference_is_adapter_off(config: Config) -> bool:
    """Return whether the LoRA policy before training is the reference, so that no second model is loaded."""
    policy = config.policy
    if not uses_reference(config) or policy.lora is None:
        return False
    starts_as_its_model = policy.adapter is None and policy.lora.quantize is None
    return config.reference is None or (starts_as_its_model and config.reference == _policy_as_reference(config))


def sampler_top_tokens(config: Config) -> int:
    """Return the number of the sampler's likeliest tokens that the policy reads with each sampled token."""
    if config.policy.support_replay and config.rollouts is not None:
        return config.rollouts.top_k or 0
    correction = getattr(config.algorithm, "correction", None)
    return (None if correction is None else correction.center_top_k) or 0


def saved_rank(lora: LoraConfig) -> int:
    """Return the rank of the adapter as shipped and saved. PiSSA doubles the rank to subtract the initial adapter."""
    return 2 * lora.rank if lora.init == "pissa" else lora.rank


def merged_because(lora: LoraConfig, *, vision: bool) -> str | None:
    """Return why the engines get all weights with the adapter merged, or None if the engines get only the adapter.

    vision: the adapter adapts the vision tower too.
    """
    if vision:
        return "not all of vLLM's models take an adapter of their vision tower"
    if lora.dora:
        return "vLLM takes no DoRA"
    if lora.modules_to_save:
        return "vLLM takes no modules_to_save"
    if lora.target_parameters:
        return "adapters of stacked experts are not sent"
    if lora.quantize is not None:
        return f"the policy's base is {lora.quantize}, the engines' is not"
    if saved_rank(lora) > MAX_ENGINE_RANK:
        return f"vLLM takes no rank of {saved_rank(lora)}"
    return None


def ships_adapter(config: Config) -> bool:
    """Return whether only the adapter is sent to the engines. The engines then have the base model."""
    lora, vision = config.policy.lora, config.policy.vision_lr is not None
    return lora is not None and merged_because(lora, vision=vision) is None


def leaves_tower(config: Config) -> bool:
    """Return whether a sync leaves out the vision tower: the engines keep the frozen tower of the model's folder.

    Engines on the policy's GPUs keep no weights between syncs.
    """
    return config.policy.vision_lr is None and "policy" not in shares_engines_gpus(config)


def uses_reward_model(config: Config) -> bool:
    """Return whether a reward uses the model of the `reward` section."""
    return any(reward.role == "reward" for reward in config.rewards.values())


def shares_engines_gpus(config: Config) -> frozenset[Role]:
    """Return the roles whose states leave the GPUs while engines are awake. A reward model stays, as it scores then."""
    roles, needed = config.cluster.roles, needs(config)
    if config.cluster.device == "cpu" or "rollout" not in needed or roles.rollout.colocate_with is None:
        return frozenset()
    hosts = {"policy", *(role for role in GUESTS_OF_ENGINES if getattr(roles, role).colocate_with is not None)}
    return (needed & hosts) - served_roles(config)


def restarts_gangs(config: Config) -> bool:
    """Return whether lost ranks are started again: never on the engines' GPUs, where ranks take no snapshots."""
    return config.cluster.restarts.gang > 0 and not shares_engines_gpus(config)


def reference_model(config: Config) -> ReferenceConfig:
    return config.reference or _policy_as_reference(config)


def _policy_as_reference(config: Config) -> ReferenceConfig:
    return ReferenceConfig(**{name: getattr(config.policy, name) for name in ReferenceConfig.model_fields})


def how_to_need_reference(config: Config) -> str:
    if reference_is_adapter_off(config):
        return "the policy with its adapter off is the reference; name another reference.model if you want a second one"
    is_online = isinstance(config.algorithm, OnlineConfig)
    return "set algorithm.kl.coef above 0" if is_online else ROLE_USES["rollout"].how_to_need(config)


def critic_model(config: Config) -> CriticConfig:
    policy = config.policy
    if config.critic is not None:
        return config.critic
    values = {name: getattr(policy, name) for name in CriticConfig.model_fields}
    if policy.lora is not None:  # the critic does not train the policy's head and embedding
        values["lora"] = policy.lora.model_copy(update={"modules_to_save": ()})
    return CriticConfig(**values)


def is_served(config: Config) -> bool:
    """Return whether the teachers are behind URLs, so that the run holds no model of a teacher."""
    return any(teacher.url is not None for teacher in teachers(config).values())


def served_roles(config: Config) -> frozenset[Role]:
    """Return the roles whose workers ask a server in place of a model. The workers take no GPU."""
    return frozenset({"teacher"} if is_served(config) else ())


def teachers(config: Config) -> Mapping[str, TeacherConfig]:
    """Return the teachers by name. A single teacher has the name ONLY_TEACHER."""
    given = config.teacher
    if given is None:
        return {}
    return {ONLY_TEACHER: given} if isinstance(given, TeacherConfig) else given


def teacher_keys(config: Config) -> dict[str, Key]:
    """Return the key of each teacher's section by the teacher's name."""
    return {name: ("teacher", name) if has_named_teachers(config) else ("teacher",) for name in teachers(config)}


def has_named_teachers(config: Config) -> bool:
    return isinstance(config.teacher, dict)


def teacher_column(config: Config) -> str | None:
    """Return the column of a row with the name of its teacher, or None for a single teacher."""
    return config.algorithm.teacher_column if isinstance(config.algorithm, TaughtConfig) else None


def reads_teacher_heads(config: Config) -> bool:
    return isinstance(config.algorithm, TaughtConfig) and config.algorithm.reads_teacher_heads


def teacher_of(config: Config, columns: Mapping[str, Any]) -> str:
    """Return the name of the teacher of a row with these columns."""
    column = teacher_column(config)
    return ONLY_TEACHER if column is None else str(columns[column])


def model_sections(config: Config) -> dict[Key, ModelConfig]:
    """Return the written sections of models of the run by key. Each named teacher has a section."""
    written = {role: getattr(config, role) for role in MODEL_SECTIONS if getattr(config, role) is not None}
    several = config.teacher if isinstance(config.teacher, dict) and not is_served(config) else {}
    if several or is_served(config):
        written.pop("teacher")
    alone: dict[Key, ModelConfig] = {(role,): section for role, section in written.items()}
    return alone | {("teacher", name): section for name, section in several.items()}


def with_model_sections(config: Config, changed: Mapping[Key, ModelConfig]) -> Config:
    """Return the configuration with sections of `model_sections` replaced."""
    update: dict[str, Any] = {key[0]: section for key, section in changed.items() if len(key) == 1}
    named = {key[1]: section for key, section in changed.items() if len(key) > 1}
    if named and isinstance(config.teacher, dict):
        update["teacher"] = {**config.teacher, **named}
    return config.model_copy(update=update)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleUse:
    """Say which runs have a role, and which model the role's workers hold, the first of several. Model None: functions,
    or a server."""

    is_needed: Callable[[Config], bool]
    model: Callable[[Config], ModelConfig | None]
    how_to_need: Callable[[Config], str] = lambda config: "choose an algorithm that samples responses"


ROLE_USES: Mapping[Role, RoleUse] = {
    "policy": RoleUse(is_needed=lambda config: True, model=lambda config: config.policy),
    "critic": RoleUse(
        is_needed=lambda config: config.algorithm.has_critic, model=critic_model, how_to_need=lambda config: "use ppo"
    ),
    "reference": RoleUse(
        is_needed=lambda config: uses_reference(config) and not reference_is_adapter_off(config),
        model=reference_model,
        how_to_need=how_to_need_reference,
    ),
    "teacher": RoleUse(
        is_needed=lambda config: config.algorithm.has_teacher,
        model=lambda config: None if is_served(config) else next(iter(teachers(config).values()), None),
        how_to_need=lambda config: f"use {'on_policy_' if config.algorithm.is_online else ''}distillation",
    ),
    "reward": RoleUse(
        is_needed=lambda config: config.algorithm.is_online,
        model=lambda config: config.reward if uses_reward_model(config) else None,
    ),
    "rollout": RoleUse(is_needed=lambda config: config.algorithm.is_online, model=lambda config: config.policy),
}


def needs(config: Config) -> frozenset[Role]:
    return frozenset(role for role, use in ROLE_USES.items() if use.is_needed(config))


def models_of(config: Config) -> dict[Role, ModelConfig]:
    models = {role: ROLE_USES[role].model(config) for role in MODEL_SECTIONS if role in needs(config)}
    return {role: model for role, model in models.items() if model is not None}


def loaded_models(config: Config) -> list[tuple[Role, str, ModelConfig]]:
    """Return the models of all roles, each with its key below the role's section. Reward and teacher may have
    several."""
    return [(role, key, model) for role in models_of(config) for key, model in held_models(config, role).items()]


def held_models(config: Config, role: Role) -> Mapping[str, ModelConfig]:
    """Return all models that a role's workers hold, by key below the role's section. Empty: only functions, or a
    server."""
    model = ROLE_USES[role].model(config)
    if isinstance(model, RewardModelConfig):
        return model.models
    if role == "teacher" and model is not None and has_named_teachers(config):
        return {f"{name}.model": section for name, section in teachers(config).items()}
    return {} if model is None else {"model": model}


def trained_sections(config: Config) -> dict[Role, PolicyConfig | CriticConfig]:
    return {role: model for role, model in models_of(config).items() if isinstance(model, PolicyConfig | CriticConfig)}


def has_value_head(config: Config, role: Role) -> bool:
    """Return whether a role's model gives a number per token instead of a distribution."""
    return role == "critic" or (role == "policy" and config.algorithm.has_scalar_head)


def source_of(source: DataSource) -> str | TaskSource | PresetSource:
    """Return a source of the configuration as `rlhf.data.sources` reads it."""
    if isinstance(source, str):
        return source
    return PresetSource(**dict(source)) if isinstance(source, PresetConfig) else TaskSource(**source.model_dump())


def hub_name(source: DataSource) -> str | None:
    """Return the data set's name, possibly on the hub, without the split. None: the source is certainly not there."""
    if isinstance(source, PresetConfig):
        return presets()[source.preset].hub if source.path is None else None
    return source.partition(":")[0] if isinstance(source, str) else None


def train_sets(config: Config) -> Mapping[str, WeightedSource]:
    """Return training sets by the key of their source. A single set has all the weight."""
    train = config.data.train
    if isinstance(train, dict):
        return {f"data.train.{name}.source": source for name, source in train.items()}
    return {"data.train": WeightedSource(source=train)}


def chat_template(config: Config) -> ChatTemplate:
    """Return the run's changes to the chat template. The driver has put the file's text in place of the file name."""
    return ChatTemplate(text=config.data.chat_template, kwargs=config.data.chat_template_kwargs)


def max_sequence_tokens(config: Config) -> int:
    """Return the limit of an offline sequence's tokens. All sequences of a row must fit into one micro-batch."""
    limit, budget = config.data.max_sequence_tokens, config.train.max_tokens_per_microbatch
    return budget // sequences_per_row(config) if limit is None else limit


def sequences_per_row(config: Config) -> int:
    """Return the number of sequences per offline row, which pass through the model together."""
    return 2 + config.algorithm.needs_gold if config.algorithm.kind in ("preference", "reward_model") else 1


def eval_sets(config: Config) -> Mapping[str, DataSource]:
    """Return held-out sets by name. A single set is called `heldout`."""
    held_out = config.data.eval
    if held_out is None:
        return {}
    return held_out if isinstance(held_out, dict) else {"heldout": held_out}


EVAL_METRICS: Mapping[Kind, tuple[str, ...]] = {
    "supervised": ("loss", "perplexity", "token_accuracy"),
    "distillation": ("loss", "token_accuracy", "nll"),
    "preference": ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward"),
    "reward_model": ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "calibration_error"),
    "step_rewards": ("loss", "accuracy"),
    "unpaired": ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward"),
}


def eval_metrics(config: Config) -> tuple[str, ...]:
    if not config.algorithm.is_online:
        return EVAL_METRICS[config.algorithm.kind]
    settings = config.eval
    ks = settings.k or tuple(2**i for i in range(settings.samples_per_prompt.bit_length()))
    votes = [f"{mark}@{k}" for mark in ("pass", "maj") for k in ks if mark == "pass" or k > 1]
    scored = ("score", "score_low", "score_high", *votes, *(("greedy",) if settings.greedy else ()))
    teacher = ("kl_teacher",) if config.algorithm.kind == "sampled_distillation" else ()
    return (*(scored if config.rewards else ()), *teacher, "truncated", "response_tokens", *config.rewards)


TRAITS_OF_KIND: Mapping[Kind, tuple[str, ...]] = {
    "advantages": ("advantages",),
    "sampled_pairs": ("preference",),
    "sampled_distillation": ("advantages",),
    "self_distillation": ("advantages",),
    "supervised": ("sft",),
    "distillation": ("sft", "distillation"),
    "preference": ("preference",),
    "reward_model": ("preference",),
    "step_rewards": ("steps",),
    "unpaired": ("preference",),
}


def traits(config: Config) -> frozenset[str]:
    """Return the traits of a run. The run's metrics depend on the traits (rlhf.tracking.metrics.declarations)."""
    algorithm, rollouts = config.algorithm, config.rollouts
    optional = {
        "online": algorithm.is_online,
        "groups": algorithm.is_online,
        "rewards": bool(config.rewards),
        "reference": uses_reference(config),
        "teachers": has_named_teachers(config),
        "taught": algorithm.distils_rollouts or algorithm.privileged_template is not None,
        "self_taught": algorithm.privileged_template is not None,
        "correction": getattr(algorithm, "correction", None) is not None,
        "environment": rollouts is not None and rollouts.environment is not None,
        "agent": rollouts is not None and rollouts.agent is not None,
        "eval": bool(eval_sets(config) or config.eval.suites),
        "gpu": config.cluster.device == "cuda",
    }
    present = (name for name, is_present in optional.items() if is_present)
    return frozenset((*TRAITS_OF_KIND[algorithm.kind], *needs(config), *present))


def responses_per_step(rollouts: RolloutsConfig) -> int:
    return rollouts.prompts_per_step * rollouts.samples_per_prompt


def prompts_at_once(needed: int, rollouts: RolloutsConfig) -> int:
    """Return the prompts sampled to get `needed` prompts. Oversampling adds at least one prompt."""
    if rollouts.oversample == 1.0:
        return needed
    return max(needed + 1, math.ceil(needed * rollouts.oversample - 1e-9))  # 10 * 1.1 is slightly above 11


def prompts_asked(config: Config, rollouts: RolloutsConfig) -> int:
    """Return the largest number of prompts sampled in a run, including filtered and cancelled groups."""
    left_out = 0.0
    if rollouts.dynamic_sampling is not None:
        left_out += rollouts.dynamic_sampling.max_filtered_fraction
    if drops(config.rewards, config.reward_policy):
        left_out += 1.0 / (1.0 - config.reward_policy.max_dropped_fraction) - 1.0
    return config.train.num_steps * prompts_at_once(math.ceil(rollouts.prompts_per_step * (1.0 + left_out)), rollouts)


def rows_per_step(config: Config, rollouts: RolloutsConfig) -> int:
    """Return the most rows trained on in one step: responses, or a pair per prompt."""
    is_pairs = config.algorithm.kind == "sampled_pairs"
    return rollouts.prompts_per_step * (1 if is_pairs else trained_per_prompt(config, rollouts)[0])


def updates_per_step(config: Config) -> int:
    """Return the optimizer steps per step: minibatches of a batch times passes over it. Supervised runs have 1."""
    if config.rollouts is None:
        return 1
    rows = rows_per_step(config, config.rollouts)
    return rows // config.train.sequences_per_update * config.train.epochs_per_batch


def policy_optimizer_steps(config: Config) -> int:
    """Return the policy's optimizer steps in the whole run, without steps of critic warm-up."""
    return max(config.train.num_steps - config.algorithm.critic_only_steps, 0) * updates_per_step(config)


def critic_optimizer_steps(config: Config) -> int:
    return config.train.num_steps * updates_per_step(config)


def warmup_steps(train: TrainConfig, optimizer_steps: int) -> int:
    """Return the number of optimizer steps with a rising learning rate."""
    return train.warmup_steps or math.ceil(train.warmup_ratio * optimizer_steps - 1e-9)


def with_steps(config: Config, rows: int) -> Config:
    """Return the configuration with train.steps in place of train.epochs, given the rows of data.train."""
    train = config.train
    if train.epochs is None:
        return config
    rows_of_a_step = train.sequences_per_update if config.rollouts is None else config.rollouts.prompts_per_step
    steps = max(1, math.ceil(train.epochs * rows / rows_of_a_step - 1e-9))
    return config.model_copy(update={"train": train.model_copy(update={"steps": steps, "epochs": None})})


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSync:
    """Name the transport of the policy's weights to the engines, and the reason for the choice."""

    method: Transport
    why: str


def weight_sync(cluster: ClusterConfig, *, one_host: bool) -> WeightSync:
    """Choose the weight transport. `one_host`: the policy's first rank and all engines are on one machine."""
    if cluster.weight_sync != "auto":
        return WeightSync(method=cluster.weight_sync, why="cluster.weight_sync sets it")
    if cluster.device == "cpu":
        hosts = "one CPU host" if one_host else "several CPU hosts"
        return WeightSync(method="shm" if one_host else "gloo", why=f"policy and engines are on {hosts}")
    if cluster.roles.rollout.colocate_with == "policy":
        return WeightSync(method="ipc", why="policy and engines share GPUs")
    return WeightSync(method="nccl", why="policy and engines have separate GPUs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Derived:
    """Hold the roles and the arithmetic of one run."""

    needs: tuple[Role, ...]  # roles with workers
    trained: Mapping[Role, PolicyConfig | CriticConfig]  # see trained_sections
    shares_engines_gpus: frozenset[Role]
    uses_reward_model: bool
    ships_adapter: bool
    sequences_per_step: int
    rows_per_step: int  # unit of updates: sequences, or pairs
    updates_per_batch: int  # minibatches of one pass over a step's batch
    updates_per_step: int
    data_parallel_ranks: int  # of the policy
    longest_sequence: int  # tokens
    tokens_per_step: int  # at most
    reference: Literal["none", "adapter off", "workers"]


def derive(config: Config) -> Derived:
    """Return what validation compares and `rlhf plan` shows."""
    train, rollouts, policy = config.train, config.rollouts, config.cluster.roles.policy
    sequences = responses_per_step(rollouts) if rollouts else train.sequences_per_update
    rows = rows_per_step(config, rollouts) if rollouts else sequences
    longest = rollouts.longest_sequence(config.data.max_prompt_tokens) if rollouts else max_sequence_tokens(config)
    needed = needs(config)
    return Derived(
        needs=tuple(role for role in ROLE_ORDER if role in needed),
        trained=trained_sections(config),
        shares_engines_gpus=shares_engines_gpus(config),
        uses_reward_model=uses_reward_model(config),
        ships_adapter=ships_adapter(config),
        sequences_per_step=sequences,
        rows_per_step=rows,
        updates_per_batch=rows // train.sequences_per_update,
        updates_per_step=updates_per_step(config),
        data_parallel_ranks=policy.data_parallel_ranks,
        longest_sequence=longest,
        tokens_per_step=sequences * longest,
        reference="workers" if "reference" in needed else "adapter off" if uses_reference(config) else "none",
    )

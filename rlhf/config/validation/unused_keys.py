"""List keys without effect in a run. Load refuses them if they are written, and dump leaves them out.

A key is listed if and only if the run would be the same for any value of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel

from rlhf.algorithms.cpo import CPOConfig
from rlhf.algorithms.distillation import DistillationConfig
from rlhf.algorithms.dpo import SMOOTHED, LogRatioConfig
from rlhf.algorithms.gdpo import GDPOConfig
from rlhf.algorithms.on_policy_distillation import OnPolicyDistillationConfig
from rlhf.algorithms.raft import RAFTConfig
from rlhf.algorithms.section import Section
from rlhf.algorithms.shared import FollowedReferenceConfig, OnlineConfig
from rlhf.config import derive
from rlhf.config.files.yaml_tree import Key
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.data import TaskConfig
from rlhf.config.schema.rewards import RewardConfig, drops
from rlhf.config.schema.root import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Inert:
    """Name a key, or a section with all its keys, that has no effect."""

    key: Key
    why: str  # the rule and the values behind it
    fix: str  # the change to make if the key was meant


OF_WANDB = " ".join(f"tracking.wandb_{key}" for key in ("project", "entity", "group", "tags", "checkpoints"))
MORE_UPDATES = "lower train.sequences_per_update or raise train.epochs_per_batch"


def is_written(config: Section, key: Key) -> bool:
    """Return whether the user gave the key. A default null or empty mapping does not count."""
    node: object = config
    for part in key:
        if isinstance(node, dict) and part in node:
            node = node[part]
            continue
        if not isinstance(node, BaseModel) or part not in node.model_fields_set:
            return False
        field = type(node).model_fields[part]
        node = getattr(node, part)
    return not ((node is None or node == {}) and node == field.get_default(call_default_factory=True))


def inert_keys(config: Config) -> Iterator[Inert]:
    """Yield all keys without effect, sections before single keys."""
    yield from _of_method(config)
    yield from _of_models(config)
    if isinstance(config.algorithm, OnlineConfig):
        yield from _of_algorithm(config, config.algorithm)
    if isinstance(config.algorithm, FollowedReferenceConfig) and derive.uses_reference(config):
        yield from _of_reference(config, config.algorithm)
    if derive.is_online(config):
        yield from _of_rewards(config)
        yield from _of_kept(config)
    yield from _of_preferences(config)
    yield from _of_distillation(config)
    yield from _of_data_and_training(config)
    yield from inert_in_cluster(config.cluster)


def _all(dotted: str, why: str, fix: str) -> Iterator[Inert]:
    for key in dotted.split():
        yield Inert(key=tuple(key.split(".")), why=why, fix=fix)


def _of_method(config: Config) -> Iterator[Inert]:
    name = config.algorithm.name
    if not derive.is_online(config):
        yield from _all(
            "rollouts rewards reward_policy reward critic cluster.weight_sync data.max_prompt_tokens data.curriculum "
            "eval.temperature eval.samples_per_prompt eval.greedy eval.k eval.pass_score eval.answer eval.by "
            "tracking.samples_per_step train.epochs_per_batch",
            f"algorithm {name} samples no responses",
            "choose an algorithm that does",
        )
        if derive.needs_reference_logprobs(config):
            why = f"the reference of algorithm {name} is the policy before training"
            yield from _all("reference", why, "start from the model that you want as policy.model")
        else:
            yield from _all("reference", f"algorithm {name} has no reference", "use dpo")
    else:
        yield from _all(
            "data.max_sequence_tokens",
            f"algorithm {name} samples what it trains on",
            "choose an algorithm that learns from given answers",
        )
        if config.data.too_long == "error":
            why = f"algorithm {name} leaves out no rows but prompts that are too long, and data.too_long is error"
            yield from _all("data.max_unusable_fraction", why, "set data.too_long to skip or cut")
        if not derive.has_critic(config):
            yield from _all("critic", f"algorithm {name} has no critic", "use ppo")
    if not derive.has_teacher(config):
        other = "on_policy_distillation" if derive.is_online(config) else "distillation"
        yield from _all("teacher", f"algorithm {name} has no teacher", f"use {other}")
    if derive.is_online(config) and not derive.uses_reward_model(config):
        yield from _all("reward", "no reward uses it", "add a reward with `role: reward` to rewards")
    for role in derive.ROLE_ORDER:
        if role not in derive.needs(config):
            yield from _all(f"cluster.roles.{role}", f"this run starts no {role} role", _how_to_need(config, role))


def _how_to_need(config: Config, role: str) -> str:
    if role == "reference" and derive.reference_is_adapter_off(config):
        return "the policy with its adapter off is the reference; name another reference.model if you want a second one"
    if role == "reference" and isinstance(config.algorithm, OnlineConfig):
        return "set algorithm.kl.coef above 0"
    if role == "teacher":
        return "use on_policy_distillation" if derive.is_online(config) else "use distillation"
    return "use ppo" if role == "critic" else "choose an algorithm that samples responses"


def _of_models(config: Config) -> Iterator[Inert]:
    for role in ("policy", "critic"):
        section = getattr(config, role)
        if section is not None and section.adapter is not None:
            keys = "rank alpha target_modules layers modules_to_save rslora dora init"
            yield from _all(
                " ".join(f"{role}.lora.{key}" for key in keys.split()),
                f"{role}.adapter names an adapter, which has its own",
                f"set {role}.adapter to null to train a new one",
            )
    if not derive.is_online(config):
        return
    if derive.distils_rollouts(config):
        yield from _all("reference", f"algorithm {config.algorithm.name} has no reference", "use grpo")
    elif not derive.uses_reference(config):
        yield from _all("reference", "algorithm.kl.coef is 0", "set algorithm.kl.coef above 0")
    elif derive.reference_is_adapter_off(config):
        why = "the policy with its LoRA adapter off is that very model"
        yield from _all("reference", why, "name another reference.model if you want one")


def _of_reference(config: Config, algorithm: FollowedReferenceConfig) -> Iterator[Inert]:
    steps = config.train.steps
    if steps is not None and (algorithm.reference_every or 0) >= steps:
        why = f"the run ends after train.steps {steps}, before a new reference is read"
        yield from _all("algorithm.reference_every", why, "lower it")


def _of_algorithm(config: Config, algorithm: OnlineConfig) -> Iterator[Inert]:
    if algorithm.kl.coef == 0.0:
        keys = "algorithm.kl.estimator algorithm.kl.place algorithm.reference_every"
        yield from _all(keys, "algorithm.kl.coef is 0", "set algorithm.kl.coef above 0")
    if isinstance(algorithm, RAFTConfig):
        why = f"algorithm {algorithm.name} imitates what it keeps, without advantages"
        yield from _all("algorithm.advantage_clip", why, "choose an algorithm with advantages")
        why = f"algorithm {algorithm.name} has no tokens of negative advantage"
        yield from _all("algorithm.correction.off_policy_mask", why, "bound the ratios by reject")
    correction, clips = algorithm.correction, algorithm.off_policy_keys
    if correction is not None and correction.weights is None:
        keys = "algorithm.correction.max_ratio algorithm.correction.min_ratio"
        yield from _all(keys, "algorithm.correction.weights is null", "choose weights")
    if correction is not None and correction.mode == "policy_gradient":
        why = "algorithm.correction.mode is policy_gradient, whose loss has no importance ratio"
        fix = "set algorithm.correction.mode to bypass or decoupled"
        keys = " ".join(f"algorithm.{key}" for key in (*clips, *algorithm.token_selection_keys))
        yield from _all(keys, why, fix)
    if not algorithm.bypasses_old_logprobs:
        yield from _of_ratios(config, clips, or_else=", or set algorithm.correction.mode to bypass")
    if config.rollouts is not None and derive.updates_per_step(config) == 1:
        why = "each batch is trained on in one optimizer step, from the values it was computed with: none has moved yet"
        keys = " ".join(f"algorithm.{key}" for key in algorithm.critic_reuse_keys)
        yield from _all(keys, why, MORE_UPDATES)


def _of_ratios(config: Config, keys: Sequence[str], *, or_else: str = "") -> Iterator[Inert]:
    """Yield algorithm keys without effect if all importance ratios are 1."""
    rollouts = config.rollouts
    if rollouts is not None and derive.updates_per_step(config) == 1:
        yield from _all(
            " ".join(f"algorithm.{key}" for key in keys),
            f"the batch of {derive.rows_per_step(config, rollouts)} responses is trained on in one optimizer step, "
            "from the weights that sampled it: every ratio is 1 and nothing is clipped",
            MORE_UPDATES + or_else,
        )


def _of_kept(config: Config) -> Iterator[Inert]:
    """Yield rollouts.keep_per_prompt if the algorithm selects responses itself."""
    key, name = "rollouts.keep_per_prompt", config.algorithm.name
    if derive.pairs_rollouts(config):
        yield from _all(key, f"algorithm {name} takes a pair of them", "choose an algorithm with advantages")
    elif derive.distils_rollouts(config):
        yield from _all(key, f"algorithm {name} learns from all of them", "choose an algorithm with advantages")
    elif derive.most_kept(config) is not None:
        yield from _all(key, f"algorithm {name} keeps the best by itself", "set algorithm.keep")


def _of_distillation(config: Config) -> Iterator[Inert]:
    algorithm = config.algorithm
    if not isinstance(algorithm, DistillationConfig | OnPolicyDistillationConfig):
        return
    why = f"algorithm.divergence is {algorithm.divergence}"
    if algorithm.divergence != "jsd":
        yield from _all("algorithm.beta", why, "set algorithm.divergence to jsd")
    if isinstance(algorithm, OnPolicyDistillationConfig):
        if algorithm.is_sampled:
            yield from _of_ratios(config, algorithm.off_policy_keys)
        else:
            keys = "algorithm.clip_low algorithm.clip_high algorithm.reward_coef"
            yield from _all(keys, why, "set algorithm.divergence to sampled_reverse_kl")


def _of_rewards(config: Config) -> Iterator[Inert]:
    if not config.rewards:
        keys = "reward_policy rollouts.dynamic_sampling data.curriculum"
        yield from _all(keys, "there are no rewards", "name one in rewards")
        return
    rule = None if config.rollouts is None else config.rollouts.dynamic_sampling
    bounded = rule is not None and (rule.min_mean, rule.max_mean) != (None, None)
    if not derive.compares_responses(config) and not bounded:
        why = f"{config.algorithm.name} learns from responses of equal scores too, and no bound of the mean is set"
        yield from _all("rollouts.dynamic_sampling", why, "set its min_mean or max_mean")
    if not drops(config.rewards, config.reward_policy):
        why = "reward_policy.on_error is fail, and no reward's on_error is drop: nothing is dropped"
        yield from _all("reward_policy.max_dropped_fraction", why, "set reward_policy.on_error to drop")
    if all(reward.function is None for reward in config.rewards.values()):
        keys = "reward_policy.timeout_s reward_policy.processes reward_policy.memory_gib"
        yield from _all(keys, "no reward is a function", "add a reward with `function`")
    yield from inert_in_rewards(config.rewards)
    if isinstance(config.algorithm, GDPOConfig):
        for name in config.rewards:
            why = "algorithm gdpo normalises each reward within its group"
            yield Inert(key=("rewards", name, "normalize"), why=why, fix="use another algorithm")


def inert_in_rewards(rewards: Mapping[str, RewardConfig], *, at: Key = ()) -> Iterator[Inert]:
    """Yield keys of single rewards without effect. `at` is the section around `rewards`."""
    for name, reward in rewards.items():
        key = (*at, "rewards", name)
        of_service = f"{'.'.join(key)}.url is null: it is no service"
        if reward.url is None:
            for field in ("token_env", "judge", "http"):
                yield Inert(key=(*key, field), why=of_service, fix="name the service as `url`")
        if reward.judge is not None and reward.judge.choices:
            for field in ("pattern", "scale"):
                why = f"{'.'.join((*key, 'judge', 'choices'))} says what the answer is worth"
                yield Inert(key=(*key, "judge", field), why=why, fix="remove `choices`")
        if reward.role == "reward" and all(
            other.credit == "step" for other in rewards.values() if other.role == "reward"
        ):
            why = f"{'.'.join((*key, 'credit'))} is step: nothing is combined"
            yield Inert(key=(*at, "reward", "steps", "combine"), why=why, fix="set that to response")
        if reward.weight == 0.0:
            for field in ("gate", "normalize"):
                yield Inert(key=(*key, field), why=f"{'.'.join(key)}.weight is 0", fix="give it a weight")


def _of_preferences(config: Config) -> Iterator[Inert]:
    algorithm = config.algorithm
    if isinstance(algorithm, LogRatioConfig):
        if algorithm.divergence != "alpha":
            why = f"algorithm.divergence is {algorithm.divergence}"
            yield from _all("algorithm.divergence_alpha", why, "set algorithm.divergence to alpha")
        if not SMOOTHED & set(algorithm.losses):
            why = f"algorithm.loss {', '.join(algorithm.losses)} does not read it"
            yield from _all("algorithm.label_smoothing", why, f"use one of {', '.join(sorted(SMOOTHED))}")
    if isinstance(algorithm, CPOConfig) and algorithm.loss != "sigmoid":
        why = f"algorithm.loss {algorithm.loss} does not read it"
        yield from _all("algorithm.label_smoothing", why, "use sigmoid")


def _of_data_and_training(config: Config) -> Iterator[Inert]:
    data, rollouts, steps = config.data, config.rollouts, config.train.steps
    if data.curriculum is not None and rollouts is not None and steps and isinstance(data.train, TaskConfig):
        num_prompts = steps * rollouts.prompts_per_step
        replaced = rollouts.dynamic_sampling is not None or drops(config.rewards, config.reward_policy)
        if num_prompts <= data.train.size and not replaced and rollouts.oversample == 1.0:
            why = (
                f"train.steps * rollouts.prompts_per_step = {num_prompts} prompts are asked, and data.train has as many"
            )
            yield from _all("data.curriculum", f"{why} or more: none comes up twice", "train for more steps")
    if config.data.eval is None:
        keys = "eval train.best_metric train.early_stopping"
        yield from _all(keys, "there is no data.eval", "name a held-out set as data.eval")
    elif config.train.early_stopping is not None and steps is not None:
        evaluations = -(-steps // config.eval.every)
        if config.train.early_stopping.patience >= evaluations:
            why = f"the run has {evaluations} evaluations, too few to wait for {config.train.early_stopping.patience}"
            yield from _all("train.early_stopping", why, "evaluate more often, or lower its patience")
    if config.data.eval is not None and derive.is_online(config) and config.eval.temperature == 0.0:
        why = "eval.temperature is 0: greedy responses to one prompt are all equal"
        yield from _all("eval.samples_per_prompt eval.greedy", why, "set eval.temperature above 0")
    functions = [reward for reward in config.rewards.values() if reward.function is not None and reward.weight != 0.0]
    if config.data.eval is not None and derive.is_online(config) and not functions and config.eval.pass_score is None:
        why = "no reward with a weight is a function and eval.pass_score is null, so no response passes"
        yield from _all("eval.k eval.answer", why, "set eval.pass_score")
    if isinstance(config.data.train, dict) and len(config.data.train) == 1:
        key = ("data", "train", next(iter(config.data.train)), "weight")
        yield Inert(key=key, why="there is no other set to be mixed with", fix="name another set")
    if not config.data.apply_chat_template:
        why = "data.apply_chat_template is false: nothing puts it before the prompts"
        yield from _all("data.system_prompt", why, "apply the chat template, or write it into the prompts")
    if config.train.lr_schedule == "constant":
        why = "train.lr_schedule is constant"
        yield from _all("train.min_lr_ratio", why, "set train.lr_schedule to linear or cosine")
    if config.train.optimizer == "adafactor":
        why = "train.optimizer is adafactor, which has no moments"
        yield from _all("train.betas train.eps", why, "set train.optimizer to adamw")
    why = f"train.lr_schedule is {config.train.lr_schedule}"
    if config.train.lr_schedule != "cosine_with_restarts":
        yield from _all("train.lr_cycles", why, "set train.lr_schedule to cosine_with_restarts")
    if config.train.lr_schedule != "wsd":
        yield from _all("train.lr_decay_ratio", why, "set train.lr_schedule to wsd")
    if config.tracking.wandb == "off":
        yield from _all(OF_WANDB, "tracking.wandb is off", "set tracking.wandb to offline or online")


def inert_in_cluster(cluster: ClusterConfig) -> Iterator[Inert]:
    """Yield cluster keys without effect due to device, address and colocation, whatever runs there."""
    roles = cluster.roles
    if cluster.address is not None:
        why = "cluster.address names a running Ray, whose object store has its size already"
        yield from _all("cluster.object_store_gib", why, "give --object-store-memory to `ray start`")
    engine = "cluster.roles.rollout"
    if cluster.device == "cpu":
        keys = f"{engine}.gpu_memory_utilization {engine}.enforce_eager"
        yield from _all(keys, "cluster.device is cpu", "set cluster.device to cuda")
    else:
        keys = f"{engine}.kv_cache_gib"
        keys += "".join(f" cluster.roles.{role}.threads" for role in derive.ROLE_ORDER)
        yield from _all(keys, "cluster.device is cuda", "set cluster.device to cpu")
    for role, section in roles:
        host = section.colocate_with
        if host is not None:
            key = f"cluster.roles.{role}"
            for name in ("cpus", "node_labels"):
                yield from _all(
                    f"{key}.{name}",
                    f"{key}.colocate_with is {host}: it uses what {host} reserves",
                    f"set cluster.roles.{host}.{name}, or {key}.colocate_with to null",
                )

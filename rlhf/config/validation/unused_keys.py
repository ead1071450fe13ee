"""List keys without effect in a run or an evaluation. Load refuses such keys in a file, and dump leaves them out.

A key is listed if and only if every value gives the same run. Most rules are marks beside the field (rlhf.sections).
This module says which parts a run lacks, and holds the rules about several sections.

A written default is taken, because the run is the same without the key. A default is refused only if the value comes
from elsewhere, such as the rank of a loaded adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pydantic import BaseModel

from rlhf.algorithms.online_config import FollowedReferenceConfig, OnlineConfig
from rlhf.config.derive import ROLE_USES, Derived, derive, has_named_teachers, served_roles, teacher_keys, teachers
from rlhf.config.mistakes.suggestions import choice
from rlhf.config.problem import Problem
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.data import TaskConfig
from rlhf.config.schema.evaluate import EvaluationStage
from rlhf.config.schema.rewards import RewardConfig, drops, functions_of_rubric
from rlhf.config.schema.root import Config
from rlhf.config.schema.service import TinkerConfig
from rlhf.config.yaml_tree import Key, kind
from rlhf.evaluation.passing import judges
from rlhf.role_table import ROLES, TRAINED_ROLES
from rlhf.sections import NotWith, OnlyIn, OnlyWith, Section

Missing = dict[str, tuple[str, str]]  # a part that the run lacks: the reason, and what to change
_NO_JUDGE = "no reward function with a weight above 0 judges more than length and repetition,"
_WRITTEN_BY_AGENT = ("an agent gets the prompt as it is in the data", "write it in the agent's code")
MORE_UPDATES = "lower train.sequences_per_update or raise train.epochs_per_batch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inert:
    """Name a key without effect, or a section whose keys all have no effect."""

    key: Key
    why: str  # the rule and the values behind it
    fix: str  # the change to make if the key was meant
    is_given: bool = False  # the value comes from elsewhere, and may differ from the key's default


def unused_keys(stage: Config | EvaluationStage | TinkerConfig) -> Iterator[Problem]:
    """Yield written keys without effect, each once."""
    named: set[Key] = set()
    listed: set[Key] = set()
    for inert in inert_keys(stage):
        sections = {inert.key[:length] for length in range(len(inert.key))}
        if _is_meant(stage, inert) and inert.key not in named and not listed & sections:
            named.add(inert.key)
            yield Problem(inert.key, f"has no effect here: {inert.why}; remove the key, or {inert.fix}")
        listed.add(inert.key)


def _is_meant(config: Section, inert: Inert) -> bool:
    """Return whether the user gave the key a value that may contradict the run."""
    node: object = config
    for part in inert.key:
        if isinstance(node, dict) and part in node:
            node = node[part]
            continue
        if not isinstance(node, BaseModel) or part not in node.model_fields_set:
            return False
        field = type(node).model_fields[part]
        node = getattr(node, part)
    is_default = node == field.get_default(call_default_factory=True)
    return not is_default or (inert.is_given and node is not None and node != {})


def inert_keys(stage: Config | EvaluationStage | TinkerConfig) -> Iterator[Inert]:
    """Yield all keys without effect, sections before single keys."""
    if isinstance(stage, EvaluationStage):
        return _marked(stage, _missing_device(stage.cluster) | _missing_in_evaluation(stage))
    if isinstance(stage, TinkerConfig):
        return _marked(stage, _missing_device(stage.cluster) | _missing_in_service(stage))
    return _of_run(stage, derive(stage))


def _of_run(config: Config, facts: Derived) -> Iterator[Inert]:
    yield from _marked(config, _missing_device(config.cluster) | _missing_in_run(config, facts))
    yield from _of_adapters(config, facts)
    for name, teacher in teachers(config).items() if served_roles(config) else ():
        at = teacher_keys(config)[name]
        why, fix = f"the server at {'.'.join(at)}.url holds the model", f"remove {'.'.join(at)}.url"
        for inert in ("dtype", "revision", "trust_remote_code") if teacher.url is not None else ():
            yield Inert(key=(*at, inert), why=why, fix=fix)
    for rule in config.algorithm.unused_keys():
        yield from _all(f"algorithm.{rule.key}", rule.why, rule.fix)
    if isinstance(config.algorithm, OnlineConfig):
        yield from _of_algorithm(config, config.algorithm, facts)
    else:
        yield from _of_ratios(config, facts)
    steps = config.train.steps
    every = config.algorithm.reference_every if isinstance(config.algorithm, FollowedReferenceConfig) else None
    if facts.reference != "none" and steps is not None and (every or 0) >= steps:
        why = f"the run ends after train.steps {steps}, before a new reference is read"
        yield from _all("algorithm.reference_every", why, "lower it")
    if isinstance(config.data.train, dict) and len(config.data.train) == 1:
        key = ("data", "train", next(iter(config.data.train)), "weight")
        yield Inert(key=key, why="there is no other set to mix it with", fix="name another set")


def _missing_device(cluster: ClusterConfig) -> Missing:
    device, other = cluster.device, "cuda" if cluster.device == "cpu" else "cpu"
    return {other: (f"cluster.device is {device}", f"set cluster.device to {other}")}


def _marked(section: Section, missing: Missing, at: Key = ()) -> Iterator[Inert]:
    for name, field in type(section).model_fields.items():
        key, value = (*at, name), getattr(section, name)
        for mark in field.metadata:
            if isinstance(mark, OnlyIn):
                for part in mark.parts:
                    if part in missing:
                        why, fix = missing[part]
                        yield Inert(key=key, why=why, fix=fix)
            elif isinstance(mark, OnlyWith) and not mark.allows(given := getattr(section, mark.other)):
                other, value_text = ".".join((*at, mark.other)), _plain(given)
                because = f": {mark.because.format(value=value_text)}" if mark.because else ""
                values = "another value" if isinstance(mark, NotWith) else choice([_plain(v) for v in mark.values])
                fix = f"set {other} to {values}" if given is not None or mark.values != (None,) else f"set {other}"
                yield Inert(key=key, why=f"{other} is {value_text}{because}", fix=fix, is_given=mark.gives_value)
        children = {(*key, part): child for part, child in value.items()} if isinstance(value, dict) else {key: value}
        for below, child in children.items():
            if isinstance(child, Section):
                yield from _marked(child, missing, below)


def _plain(value: object) -> str:
    if isinstance(value, str) or value == {}:
        return str(value)
    if isinstance(value, Section):
        return "given"
    return f"{value:g}" if isinstance(value, float) else kind(value)


def _all(dotted: str, why: str, fix: str) -> Iterator[Inert]:
    for key in dotted.split():
        yield Inert(key=tuple(key.split(".")), why=why, fix=fix)


def _missing_in_run(config: Config, facts: Derived) -> Missing:
    name, missing = config.algorithm.name, _missing_rewards(config.rewards)
    if config.algorithm.is_online:
        why = f"algorithm {name} samples its training data"
        missing["fixed data"] = (why, "choose an algorithm that learns from given answers")
        if config.data.too_long == "error":
            why = f"algorithm {name} skips only prompts that are too long, and data.too_long is error"
            missing["skipped rows"] = (why, "set data.too_long to skip or cut")
    else:
        missing["rollouts"] = (f"algorithm {name} samples no responses", "choose an algorithm that does")
        missing["responses"] = missing["rollouts"]
        how = "measure its result: rlhf eval RUN --suite NAME, or a stage with evaluate.suites"
        missing["engines"] = (f"algorithm {name} samples no responses", how)
    for role in ROLES.keys() - {*facts.needs}:
        fix = ROLE_USES[role].how_to_need(config)
        missing[role] = (f"algorithm {name} has no {role}", fix)
        missing[f"{role} role"] = (f"this run starts no {role} role", fix)
    if not config.rewards:
        missing["rewards"] = ("there are no rewards", "name one in rewards")
    if config.rollouts is not None and config.rollouts.agent is not None:
        missing["rendered prompts"] = _WRITTEN_BY_AGENT
    if not drops(config.rewards, config.reward_policy):
        why = "reward_policy.on_error is fail, and no reward's on_error is drop: nothing is dropped"
        missing["dropped groups"] = (why, "set reward_policy.on_error to drop")
    if not _has_passing_scores(config.rewards, config.eval.pass_score):
        why = f"{_NO_JUDGE} and eval.pass_score is null, so no response passes"
        missing["passing scores"] = (why, "set eval.pass_score")
    if not has_named_teachers(config):
        why = "there is no teacher by name"
        missing["teachers by name"] = (why, "name several teachers: teacher: {math: {model: ...}, code: {model: ...}}")
    if config.algorithm.normalizes_rewards:
        why = f"algorithm {name} normalises each reward within its group"
        missing["rewards as given"] = (why, "use another algorithm")
    return missing | _missing_reference(config, facts) | _missing_in_rollouts(config) | _missing_steps(config)


def _missing_reference(config: Config, facts: Derived) -> Missing:
    algorithm = config.algorithm
    if algorithm.uses_reference and not algorithm.is_online:
        why = f"the reference of algorithm {algorithm.name} is the policy before training"
        return {"reference model": (why, "start from the model that you want as policy.model")}
    if not algorithm.is_online or algorithm.distils_rollouts:
        fix = f"use {'grpo' if algorithm.is_online else 'dpo'}"
        return {"reference model": (f"algorithm {algorithm.name} has no reference", fix)}
    if facts.reference == "none":
        return {"reference model": ("algorithm.kl.coef is 0", "set algorithm.kl.coef above 0")}
    if facts.reference == "adapter off":
        why = "the policy with its LoRA adapter disabled is the same model"
        return {"reference model": (why, "name another reference.model if you want one")}
    return {}


def _missing_in_rollouts(config: Config) -> Missing:
    name, rollouts, missing = config.algorithm.name, config.rollouts, Missing()
    rule = None if rollouts is None else rollouts.dynamic_sampling
    bounded = rule is not None and (rule.min_mean, rule.max_mean) != (None, None)
    if not config.algorithm.compares_responses and not bounded:
        why = f"{name} learns from responses of equal scores too, and no bound of the mean score is set"
        missing["filtered groups"] = (why, "set its min_mean or max_mean")
    use = "learns from all" if config.algorithm.distils_rollouts else None
    if config.algorithm.kind == "sampled_pairs":
        use = "trains on one pair"
    if use is not None:
        fix = "choose an algorithm with advantages"
        missing["a choice of responses"] = (f"algorithm {name} {use} of them", fix)
    elif config.algorithm.most_kept is not None:
        missing["a choice of responses"] = (f"algorithm {name} keeps the best without this key", "set algorithm.keep")
    return missing


def _missing_steps(config: Config) -> Missing:
    """Return the parts missing in a run because of too few steps or a lack of evaluations."""
    data, rollouts, steps, missing = config.data, config.rollouts, config.train.steps, Missing()
    if data.curriculum is not None and rollouts is not None and steps and isinstance(data.train, TaskConfig):
        asked = steps * rollouts.prompts_per_step
        replaced = rollouts.dynamic_sampling is not None or drops(config.rewards, config.reward_policy)
        if asked <= data.train.size and not replaced and rollouts.oversample == 1.0:
            why = f"train.steps * rollouts.prompts_per_step = {asked} prompts are needed, and data.train has as many"
            missing["repeated prompts"] = (f"{why} or more: none comes up twice", "train for more steps")
    stopping = config.train.early_stopping
    if data.eval is None and not config.eval.suites:
        missing["data.eval"] = ("there is no data.eval", "name a held-out set as data.eval")
    elif stopping is not None and steps is not None and stopping.patience >= -(-steps // config.eval.every):
        why = f"the run has {-(-steps // config.eval.every)} evaluations, too few to wait for {stopping.patience}"
        missing["enough evaluations"] = (why, "evaluate more often, or lower its patience")
    return missing


def _missing_in_evaluation(stage: EvaluationStage) -> Missing:
    config, missing = stage.evaluate, _missing_rewards(stage.evaluate.rewards)
    missing["training"] = ("an evaluation trains nothing", "use it to train")
    missing["rollouts"] = ("an evaluation does not train on rollouts", "use it to train")
    workers = "rollout and reward answer" if config.rewards else "completions are measured by policy workers"
    for role in ROLES.keys() - stage.needs:
        missing[f"{role} role"] = (f"this stage starts no {role} role: {workers}", "use it to train")
    if config.agent is not None:
        missing["rendered prompts"] = _WRITTEN_BY_AGENT
    if not config.rewards:
        why = "evaluate.rewards is empty, so completions are measured and no response is sampled"
        missing["responses"] = (why, "name a reward")
        if not config.suites:
            missing["comparisons"] = missing["responses"]
        del missing["reward model"]  # the measured model has micro-batches in place of the reward model
    if not _has_passing_scores(config.rewards, config.pass_score):
        why = f"{_NO_JUDGE} and evaluate.pass_score is null, so no response passes"
        missing["passing scores"] = (why, "set evaluate.pass_score")
    return missing


def _missing_in_service(config: TinkerConfig) -> Missing:
    why = "a server for clients' loops starts only policy and rollout"
    return {f"{role} role": (why, "train with it in a run") for role in ROLES.keys() - {*config.needs}}


def _missing_rewards(rewards: Mapping[str, RewardConfig]) -> Missing:
    missing: Missing = {}
    models = [(name, reward) for name, reward in rewards.items() if reward.role == "reward"]
    if not models:
        missing["reward model"] = ("no reward uses it", "add a reward with `role: reward` to rewards")
    elif all(reward.credit == "step" for _, reward in models):
        why = f"rewards.{models[0][0]}.credit is step: nothing is combined"
        missing["combined steps"] = (why, "set that to response")
    if all(reward.function is None and not functions_of_rubric(reward) for reward in rewards.values()):
        missing["reward functions"] = ("no reward is a function", "add a reward with `function`")
    return missing


def _has_passing_scores(rewards: Mapping[str, RewardConfig], pass_score: float | None) -> bool:
    return pass_score is not None or bool(judges((name, r.function, r.weight) for name, r in rewards.items()))


def _of_adapters(config: Config, facts: Derived) -> Iterator[Inert]:
    """Yield the shape of an adapter read from a folder, and the transport of weights for a new adapter."""
    if facts.ships_adapter and config.policy.adapter is None:
        why = "the engines load only the LoRA adapter, from a folder of the run"
        yield from _all("cluster.weight_sync", why, "train all weights")
    for role in TRAINED_ROLES:
        section = getattr(config, role)
        if section is not None and section.adapter is not None:
            why = f"{role}.adapter names an adapter, which has its own"
            fix = f"set {role}.adapter to null to train a new one"
            keys = "rank alpha target_modules target_parameters layers modules_to_save rslora dora init"
            for key in keys.split():
                yield Inert(key=(role, "lora", key), why=why, fix=fix, is_given=True)


def _of_algorithm(config: Config, algorithm: OnlineConfig, facts: Derived) -> Iterator[Inert]:
    if not algorithm.uses_reference:
        yield from _all("algorithm.reference_every", "algorithm.kl.coef is 0", "set algorithm.kl.coef above 0")
    correction = algorithm.correction
    if correction is not None and correction.mode == "policy_gradient":
        why = "algorithm.correction.mode is policy_gradient, whose loss has no importance ratio"
        fix = "set algorithm.correction.mode to bypass or decoupled"
        keys = " ".join(f"algorithm.{key}" for key in (*algorithm.off_policy_keys, *algorithm.token_selection_keys))
        yield from _all(keys, why, fix)
    if not algorithm.bypasses_old_logprobs:
        yield from _of_ratios(config, facts, or_else=", or set algorithm.correction.mode to bypass")
    if config.rollouts is not None and facts.updates_per_step == 1:
        why = "a batch has only one optimizer step, in which the values are still the old ones"
        keys = " ".join(f"algorithm.{key}" for key in algorithm.critic_reuse_keys)
        yield from _all(keys, why, MORE_UPDATES)


def _of_ratios(config: Config, facts: Derived, *, or_else: str = "") -> Iterator[Inert]:
    """Yield algorithm keys without effect if all importance ratios are 1."""
    if config.rollouts is not None and facts.updates_per_step == 1:
        yield from _all(
            " ".join(f"algorithm.{key}" for key in config.algorithm.off_policy_keys),
            f"the batch of {facts.rows_per_step} responses is trained on in one optimizer step, "
            "from the weights that sampled it: every ratio is 1 and nothing is clipped",
            MORE_UPDATES + or_else,
        )

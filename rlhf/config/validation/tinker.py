"""Check a run whose policy is trained through a server of the Tinker protocol, for rlhf.config.validation.run.

The protocol trains LoRA adapters by losses of log-probabilities at temperature 1, and samples text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rlhf.algorithms.distillation import TaughtConfig
from rlhf.algorithms.online_config import OnlineConfig
from rlhf.algorithms.pairs import PreferenceConfig
from rlhf.algorithms.sft import SFTConfig
from rlhf.config.problem import Problem, problem
from rlhf.config.schema.model import LoraConfig
from rlhf.config.schema.rollouts import RolloutsConfig
from rlhf.config.schema.root import Config

SERVER = "the server of policy.tinker"
NO_EFFECT = (  # keys of ranks and engines
    "policy.gradient_checkpointing",
    *(f"cluster.roles.policy.{key}" for key in ("workers", "zero_stage", "offload", "sequence_parallel")),
    *(
        f"cluster.roles.rollout.{key}"
        for key in (
            *("engines", "tensor_parallel", "colocate_with", "kv_cache_gib", "gpu_memory_utilization"),
            *("max_num_seqs", "enforce_eager", "engine_args"),
        )
    ),
)
WHY_NO_EFFECT = f"{SERVER} has its own ranks and engines"
ONLY_LOGPROBS = f"{SERVER} returns only log-probabilities"


def tinker_problems(config: Config) -> Iterator[Problem]:
    """Yield settings that a server does not support."""
    if config.policy.tinker is None:
        return
    yield from _policy(config)
    yield from _algorithm(config)
    if config.rollouts is not None and config.algorithm.is_online:
        yield from _rollouts(config, config.rollouts)
    if config.eval.suites:
        yield problem(
            "eval.suites", f"asks engines over HTTP, and {SERVER} offers this to no other program; remove the key"
        )


def _policy(config: Config) -> Iterator[Problem]:
    policy, optimizer = config.policy, config.train.optimizer
    if policy.lora is None:
        yield problem("policy.lora", f"is null, but {SERVER} trains adapters; write `lora: {{}}`")
        return
    yield from _changed(policy.lora, LoraConfig(rank=policy.lora.rank), "policy.lora", "the protocol has this value")
    for key, why in (
        ("adapter", "a client cannot send an adapter"),
        ("revision", "the server has the model"),
        ("vision_lr", "the protocol adapts the language model"),
        ("router_balance_coef", ONLY_LOGPROBS),
        ("router_replay", ONLY_LOGPROBS),
        ("support_replay", ONLY_LOGPROBS),
    ):
        value, default = getattr(policy, key), type(policy).model_fields[key].default
        if value != default:
            yield problem(f"policy.{key}", f"is {_shown(value)}, but {SERVER} holds the policy: {why}; remove the key")
    if optimizer != "adamw":
        yield problem("train.optimizer", f"is {optimizer}, but {SERVER} has only adamw; use adamw")


def _algorithm(config: Config) -> Iterator[Problem]:
    algorithm = config.algorithm
    needed = {
        "a critic": algorithm.has_critic,
        "a model with a scalar head": algorithm.has_scalar_head,
        "a policy that teaches itself": algorithm.privileged_template is not None,
        "whole distributions of the policy": isinstance(algorithm, TaughtConfig)
        and getattr(algorithm, "divergence", None) != "sampled_reverse_kl",
    }
    for what, is_needed in needed.items():
        if is_needed:
            yield problem(
                "algorithm.name", f"is {algorithm.name}, which needs {what}, but {ONLY_LOGPROBS}; use another"
            )
            return
    found: dict[str, tuple[Any, Any]] = {}
    if isinstance(algorithm, OnlineConfig):
        found["entropy.coef"] = algorithm.entropy.coef, 0.0
        found["entropy.adaptive"] = algorithm.entropy.adaptive, None
        found["top_entropy_fraction"] = algorithm.top_entropy_fraction, None
        correction = algorithm.correction
        found["correction.center_top_k"] = None if correction is None else correction.center_top_k, None
    if isinstance(algorithm, PreferenceConfig):
        found["wpo"] = algorithm.wpo, False
    if isinstance(algorithm, SFTConfig):
        found["neftune_alpha"] = algorithm.neftune_alpha, None
    for key, (value, neutral) in found.items():
        if value != neutral:
            yield problem(f"algorithm.{key}", f"is {_shown(value)}, but {ONLY_LOGPROBS}; set it to {_shown(neutral)}")


def _rollouts(config: Config, rollouts: RolloutsConfig) -> Iterator[Problem]:
    usual = RolloutsConfig()
    if rollouts.temperature != 1.0:
        text = f"is {rollouts.temperature:g}, but {SERVER} returns log-probabilities at temperature 1; set 1.0"
        yield problem("rollouts.temperature", text)
    for key in ("min_p", "repetition_penalty"):
        if getattr(rollouts, key) != getattr(usual, key):
            text = f"is {getattr(rollouts, key):g}, but the protocol's sampling has no such parameter; remove the key"
            yield problem(f"rollouts.{key}", text)
    if rollouts.stop:
        text = "has texts, but the protocol takes either texts or tokens, and the model's end is a token"
        yield problem("rollouts.stop", f"{text}; use rollouts.stop_token_ids")
    if rollouts.agent is not None:
        yield problem(
            "rollouts.agent", f"calls engines over HTTP, and {SERVER} offers this to no other program; remove the key"
        )
    if rollouts.carry_over:
        yield problem("rollouts.carry_over", f"is true, but {SERVER} continues no unfinished response; set false")
    if rollouts.weight_updates == "in_flight":
        text = (
            f"is in_flight, but {SERVER} samples a whole response with one version of the weights; use between_batches"
        )
        yield problem("rollouts.weight_updates", text)


def _changed(section: LoraConfig, usual: LoraConfig, key: str, why: str) -> Iterator[Problem]:
    for name in type(section).model_fields:
        value, expected = getattr(section, name), getattr(usual, name)
        if value != expected:
            text = f"is {_shown(value)}, but with policy.tinker it is {_shown(expected)}: {why}; remove the key"
            yield problem(f"{key}.{name}", text)


def _shown(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)

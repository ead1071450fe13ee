"""Check how a run samples and weighs responses, for rlhf.config.validation.run."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.algorithms.algorithm import Responses
from rlhf.algorithms.online_config import OnlineConfig
from rlhf.config import derive
from rlhf.config.problem import Problem, problem
from rlhf.config.schema.cluster import ClusterConfig
from rlhf.config.schema.rollouts import AgentConfig, RolloutsConfig
from rlhf.config.schema.root import Config

STRAIGHT_THROUGH = "_straight_through"


def length_problems(config: Config, rollouts: RolloutsConfig) -> Iterator[Problem]:
    """Yield a problem if the longest possible sequence does not fit into a micro-batch."""
    prompt, new = config.data.max_prompt_tokens, rollouts.max_new_tokens
    player = rollouts.environment or rollouts.agent
    key = f"rollouts.{'environment' if rollouts.agent is None else 'agent'}.max_tokens"
    pairs, room = config.algorithm.kind == "sampled_pairs", config.train.max_tokens_per_microbatch
    whole, times = ("both responses of a pair", "2 * ") if pairs else ("the longest sequence", "")
    count = 2 if pairs else 1
    if player is None:
        longest = prompt + count * new
        sum_of = f"data.max_prompt_tokens + {times}rollouts.max_new_tokens = {prompt} + {times}{new} = {longest}"
    else:
        longest = count * player.max_tokens
        sum_of = f"{times}{key} = {longest}"
        if player.max_tokens < prompt + new:
            text = f"is {player.max_tokens} and must hold a prompt and one turn"
            rule = f"data.max_prompt_tokens + rollouts.max_new_tokens = {prompt} + {new} = {prompt + new}"
            yield problem(key, f"{text}: {rule}; raise it, or lower one of these keys")
    if room < longest:
        text = f"is {room} and must hold {whole}: {sum_of}; raise it, or lower one of these keys"
        yield problem("train.max_tokens_per_microbatch", text)


def group_problems(config: Config, rollouts: RolloutsConfig) -> Iterator[Problem]:
    yield from _kept(config, rollouts)
    algorithm, responses = config.algorithm, _responses(config, rollouts)
    problems = list(algorithm.problems(responses))
    if isinstance(algorithm, OnlineConfig) and algorithm.length_penalty is not None:
        problems += algorithm.length_penalty.problems(responses)
    yield from (problem(key, text) for key, text in problems)
    if algorithm.num_value_samples:
        yield from _values_problems(config)
    if config.algorithm.compares_turns and rollouts.environment is None and rollouts.agent is None:
        text = f"is {config.algorithm.name}, which compares turns by the observation before them"
        yield problem("algorithm.name", f"{text}; set rollouts.environment or rollouts.agent, or use grpo")
    if config.algorithm.reads_given_responses and rollouts.agent is not None:
        text = "is set, but an agent writes the prompts of its calls, and a given response follows the prompt of a row"
        yield problem("rollouts.agent", f"{text}; remove the key, or learn only from rollouts")


def _values_problems(config: Config) -> Iterator[Problem]:
    """Yield data and references for which the values of prompts cannot be estimated before the first step."""
    name = config.algorithm.name
    if config.data.stream_window is not None:
        text = f"is given, but {name} estimates the values of all prompts before the first step; set it to null"
        yield problem("data.stream_window", text)
    if config.reference is not None and config.reference.model != config.policy.model:
        text = f"is another model than policy.model, but {name} samples its values from the policy before training"
        yield problem("reference.model", f"{text}; remove the section reference")
    if config.policy.adapter is not None:
        text = (
            f"is given, so the reference would be the model without the adapter, but {name} samples its values with "
            "the adapter"
        )
        yield problem("policy.adapter", f"{text}; merge the adapter into the model first (rlhf export)")


def replay_problems(config: Config, rollouts: RolloutsConfig) -> Iterator[Problem]:
    if not config.policy.router_replay:
        return
    key, kind = "policy.router_replay", config.algorithm.kind
    if kind != "advantages":
        yield problem(key, f"is true, but algorithm {config.algorithm.name} does not train by advantages; set false")
    if rollouts.carry_over:
        yield problem(key, "is true, but rollouts.carry_over keeps no experts of begun responses; set one to false")
    if rollouts.agent is not None:
        yield problem(key, "is true, but the calls of rollouts.agent record no experts; set false")


def self_taught_problems(config: Config, rollouts: RolloutsConfig) -> Iterator[Problem]:
    """Yield parts of a run that a policy cannot use while it teaches itself."""
    algorithm = config.algorithm
    if algorithm.privileged_template is None:
        return
    if rollouts.agent is not None:
        text = f"is set, but algorithm {algorithm.name} writes one prompt, not one for each call; remove the key"
        yield problem("rollouts.agent", text)
    if config.policy.router_replay and algorithm.kind == "advantages":  # replay_problems refuses all other kinds
        text = f"is true, but no engine has routed the tokens of the teacher of {algorithm.name}; set false"
        yield problem("policy.router_replay", text)
    if not config.rewards and derive.eval_sets(config):
        text = f"has no score to measure with algorithm {algorithm.name}; add a reward to `rewards`"
        yield problem("data.eval", text)


def support_problems(config: Config, rollouts: RolloutsConfig) -> Iterator[Problem]:
    """Yield a replay of a support that is not recorded, or that another part of the loss does not know."""
    if not config.policy.support_replay:
        return
    key, algorithm = "policy.support_replay", config.algorithm
    if rollouts.top_k is None:
        why = (
            "rollouts.top_k is null, and the engines record at most top_k tokens; set top_k, also together with top_p "
            "or min_p"
        )
        yield problem(key, f"is true, but {why}")
    reasons = {
        f"algorithm {algorithm.name} does not train by advantages": algorithm.kind != "advantages",
        "rollouts.repetition_penalty changes more than the kept tokens": rollouts.repetition_penalty != 1.0,
        "the calls of rollouts.agent hold no kept tokens": rollouts.agent is not None,
        "rollouts.carry_over keeps no kept tokens of begun responses": rollouts.carry_over,
        "policy.router_replay records experts in their place": config.policy.router_replay,
        f"algorithm {algorithm.name} compares with its own distribution of all tokens": algorithm.privileged_template
        is not None,
        "the reference's log-probabilities (algorithm.kl.coef) are of all tokens": derive.uses_reference(config)
        and not derive.reference_is_adapter_off(config),
    }
    for why in (why for why, is_so in reasons.items() if is_so):
        yield problem(key, f"is true, but {why}; set false, or change that")


def centering_problems(config: Config, rollouts: RolloutsConfig) -> Iterator[Problem]:
    """Yield a sampler whose likeliest tokens are not those of the policy's whole distribution, or are not recorded."""
    correction = config.algorithm.correction if isinstance(config.algorithm, OnlineConfig) else None
    if correction is None or correction.center_top_k is None:
        return
    text = f"is {correction.center_top_k}, but"
    shaped = ("top_p", rollouts.top_p != 1.0), ("top_k", rollouts.top_k is not None), ("min_p", rollouts.min_p != 0.0)
    for name, cuts in (*shaped, ("repetition_penalty", rollouts.repetition_penalty != 1.0)):
        if cuts:
            why = f"rollouts.{name} is {getattr(rollouts, name):g}, which changes the sampler's distribution"
            yield problem("algorithm.correction.center_top_k", f"{text} {why}; set rollouts.{name} to its default")
    unrecorded = {
        "rollouts.agent is given": rollouts.agent is not None,
        "rollouts.carry_over is true": rollouts.carry_over,
        "policy.router_replay is true": config.policy.router_replay,
        "the policy teaches itself": config.algorithm.privileged_template is not None,
    }
    for name, is_set in unrecorded.items():
        if is_set:
            why = f"{name}, whose responses come without the sampler's likeliest tokens; remove one of them"
            yield problem("algorithm.correction.center_top_k", f"{text} {why}")


def agent_problems(config: Config, rollouts: RolloutsConfig) -> Iterator[Problem]:
    """Yield an algorithm without support for an agent's sessions, since a session may have several sequences."""
    if rollouts.agent is None:
        return
    if config.algorithm.kind == "sampled_pairs":
        text = f"is {config.algorithm.name}, which compares single sequences"
        yield problem("algorithm.name", f"{text}, but a session of rollouts.agent may have several; use grpo or ppo")
    yield from late_sessions(rollouts.agent, config.cluster, "rollouts.agent")


def late_sessions(agent: AgentConfig, cluster: ClusterConfig, key: str) -> Iterator[Problem]:
    """Yield a time limit of sessions so long that the engine would already count as lost."""
    if agent.timeout_s >= cluster.call_timeout_s:
        limit = f"cluster.call_timeout_s ({cluster.call_timeout_s:g})"
        text = f"is {agent.timeout_s:g}, but an engine that finishes nothing within {limit} counts as lost"
        yield problem(f"{key}.timeout_s", f"{text}; lower it, or raise that")


def _kept(config: Config, rollouts: RolloutsConfig) -> Iterator[Problem]:
    keep, samples = rollouts.keep_per_prompt, rollouts.samples_per_prompt
    if keep is None:
        return
    if keep.count >= samples:
        text = f"is {keep.count} and must be below rollouts.samples_per_prompt = {samples}, or all are kept"
        yield problem("rollouts.keep_per_prompt.count", text)
    elif config.algorithm.compares_responses and keep.count < 2:
        text = f"is {keep.count}, but {config.algorithm.name} compares the kept responses; keep 2 or more"
        yield problem("rollouts.keep_per_prompt.count", text)


def _responses(config: Config, rollouts: RolloutsConfig) -> Responses:
    single_turns = rollouts.environment is None and rollouts.agent is None
    by_step = (name for name, reward in config.rewards.items() if reward.credit == "step")
    trained, trained_key = derive.trained_per_prompt(config, rollouts)
    return Responses(
        samples_per_prompt=rollouts.samples_per_prompt,
        prompts_per_step=rollouts.prompts_per_step,
        updates_per_step=derive.rows_per_step(config, rollouts) // config.train.sequences_per_update,
        trained_per_prompt=trained,
        trained_key=trained_key,
        max_tokens=rollouts.max_response_tokens,
        max_tokens_key="rollouts.max_new_tokens" if single_turns else "what a conversation samples",
        num_rewards=sum(reward.weight != 0.0 for reward in config.rewards.values()),
        step_reward=next(by_step, None),
        num_steps=config.train.steps,
    )


def loss_problems(config: Config, rollouts: RolloutsConfig) -> Iterator[Problem]:
    """Yield problems of an algorithm with advantages as weights of rollout tokens."""
    algorithm = config.algorithm
    yield from _penalty(config, rollouts)
    if not isinstance(algorithm, OnlineConfig):
        return
    kl, entropy = algorithm.kl, algorithm.entropy
    if kl.coef > 0.0 and kl.place == "reward" and kl.estimator.endswith(STRAIGHT_THROUGH):
        plain = kl.estimator.removesuffix(STRAIGHT_THROUGH)
        text = f"is {kl.estimator}, but algorithm.kl.place is reward, where nothing has a gradient; set {plain}"
        yield problem("algorithm.kl.estimator", text)
    if kl.coef > 0.0 and kl.place == "loss" and kl.estimator == "k1":
        text = "is k1, but algorithm.kl.place is loss, where its mean gradient is 0; set k1_straight_through or k2"
        yield problem("algorithm.kl.estimator", text)
    if algorithm.mask_truncated and kl.coef > 0.0 and kl.place == "reward" and config.algorithm.compares_responses:
        text = f"is true and algorithm.kl.place is reward, but {algorithm.name} also compares masked responses"
        fix = f"set algorithm.kl to {{coef: {kl.coef:g}, place: loss, estimator: k2}}"
        yield problem("algorithm.mask_truncated", f"{text}, whose KL is not computed; {fix}")
    if entropy.adaptive is not None and entropy.coef > entropy.adaptive.max_coef:
        text = f"is {entropy.coef:g}, above algorithm.entropy.adaptive.max_coef {entropy.adaptive.max_coef:g}; lower it"
        yield problem("algorithm.entropy.coef", text)


def _penalty(config: Config, rollouts: RolloutsConfig) -> Iterator[Problem]:
    """Yield a repetition penalty without a correction, since the penalty makes the sampler another policy."""
    algorithm, penalty = config.algorithm, rollouts.repetition_penalty
    if penalty == 1.0 or not algorithm.trusts_sampler:
        return
    key = "rollouts.repetition_penalty"
    trained = "trains on log-probabilities without the penalty, as if the sampler had none"
    if algorithm.distils_rollouts:
        text = f"is {penalty:g}, but algorithm {algorithm.name} {trained}; set 1, or another algorithm.divergence"
        yield problem(key, text)
    if isinstance(algorithm, OnlineConfig):
        correction = algorithm.correction
        if correction is None or (correction.weights is None and correction.mode != "bypass"):
            text = f"is {penalty:g}, but algorithm {config.algorithm.name} {trained}"
            fix = f"set algorithm.correction to {algorithm.first_correction}, which compares with the sampler, or set 1"
            yield problem(key, f"{text}; {fix}")

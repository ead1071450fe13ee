"""The order for reading a run: sections with a question each, and the graphs with the answer.

The W&B workspace (rlhf/tracking/sinks/wandb_workspace.py) and the Grafana dashboard (rlhf/tracking/sinks/grafana.py)
are both made from this table. Every metric here is declared. A graph of metrics absent from a run stays empty.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A graph over the steps."""

    title: str
    metrics: tuple[str, ...]  # declared names, placeholders included
    log: bool = False  # logarithmic


@dataclass(frozen=True, slots=True, kw_only=True)
class PanelSection:
    """A question and the graphs for an answer."""

    title: str
    question: str
    panels: tuple[Panel, ...]


def _panel(title: str, *metrics: str, log: bool = False) -> Panel:
    return Panel(title=title, metrics=metrics, log=log)


def _section(title: str, question: str, *panels: Panel) -> PanelSection:
    return PanelSection(title=title, question=question, panels=panels)


SECTIONS = (
    _section(
        "Is it learning?",
        "The score of the training prompts, and of held-out prompts, which the policy does not see in training.",
        _panel("score", "rewards/score/mean"),
        _panel("held-out score", "eval/<set>/<metric>"),
        _panel("accuracy of pairs", "preference/accuracy/mean"),
        _panel("accuracy of tokens", "update/token_accuracy/mean"),
        _panel("loss", "update/loss/mean"),
    ),
    _section(
        "Is it stable?",
        "How far the policy has moved from its start, how large its updates are, and whether it still explores.",
        _panel("KL from the reference", "experience/kl_ref/mean"),
        _panel("entropy", "update/entropy/mean"),
        _panel("clipped tokens", "update/clip_fraction/mean"),
        _panel("KL of an update", "update/kl_old/mean"),
        _panel("gradient norm", "update/grad_norm", "update/critic_grad_norm", log=True),
        _panel("learning rate", "update/lr", "update/critic_lr"),
        _panel("largest ratio", "update/ratio/max", log=True),
        _panel("explained variance of the critic", "update/explained_variance"),
    ),
    _section(
        "Rollouts",
        "How long the responses are, how many are truncated, and how likely their tokens are.",
        _panel("response tokens", "rollouts/response_tokens/mean", "rollouts/response_tokens/max"),
        _panel("truncated responses", "rollouts/truncated/fraction"),
        _panel("logprob of a token", "rollouts/logprob/mean"),
        _panel("turns", "rollouts/turns/mean", "rollouts/turns/max"),
        _panel("tokens of a step", "rollouts/tokens/total"),
        _panel("sampler against trainer", "experience/rollout_logprob_diff/mean", "experience/kl_rollout/mean"),
        _panel("policy lag", "experience/policy_lag/mean", "experience/policy_lag/max"),
        _panel("effective samples by lag", "experience/rollout_ess_token/lag_<lag>"),
        _panel("groups in flight", "rollouts/in_flight/mean"),
        _panel("groups requested again", "rollouts/reasked_groups/total"),
        _panel("engines", "rollouts/engines"),
    ),
    _section(
        "Rewards and advantages",
        "Which rewards the responses earn, and whether the responses to one prompt still differ.",
        _panel("each reward", "rewards/<name>/mean"),
        _panel("spread of the score", "rewards/score/std"),
        _panel("prompts without a learning signal", "advantages/zero_groups/fraction"),
        _panel("spread of the advantages", "advantages/std"),
        _panel("failed reward calls", "rewards/errors/total"),
        _panel("margin of pairs", "preference/margin/mean"),
    ),
    _section(
        "Speed",
        "How a step spends its time.",
        _panel("seconds a step", "time/step_s"),
        _panel("seconds by stage", "time/<stage>_s"),
        _panel("tokens a second", "throughput/tokens_per_s"),
        _panel("sampled tokens a second", "throughput/rollout_tokens_per_s"),
        _panel("trained tokens a second", "throughput/train_tokens_per_s"),
        _panel("training waits for responses", "time/trainer_waits_s"),
        _panel("idle engines", "time/engines_idle/fraction"),
        _panel("model flops utilization", "throughput/mfu"),
    ),
    _section(
        "Memory and nodes",
        "How much memory the roles use, how busy the machines are, and which workers were lost.",
        _panel("memory of the roles", "memory/<role>_rss_gib"),
        _panel("GPU memory of the roles", "memory/<role>_gpu_gib"),
        _panel("busy cores", "system/<node>/cpu_fraction"),
        _panel("memory of the nodes", "system/<node>/memory_gib"),
        _panel("busy GPUs", "system/<node>/gpu_fraction"),
        _panel("GPU memory of the nodes", "system/<node>/gpu_memory_gib"),
        _panel("lost workers, started again", "recovery/<role>/total"),
        _panel("seconds of recoveries", "time/recovery_s"),
    ),
    _section(
        "Weight sync",
        "Whether the engines have the weights of the trainer.",
        _panel("largest difference on the probe", "weight_sync/probe_max_diff", log=True),
        _panel("version of the engines", "weight_sync/version"),
    ),
)

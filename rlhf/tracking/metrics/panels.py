"""The order for reading a run: sections with a question each, and the graphs with the answer.

The W&B workspace (rlhf/tracking/sinks/wandb_workspace.py) and the Grafana dashboard (rlhf/tracking/sinks/grafana.py)
are both made from this table. Every metric here is declared. A graph of metrics absent from a run stays empty.
"""

from __future__ import annotations


class Panel:
    """A graph of metrics over the steps, logarithmic on request. `metrics` are declared names with placeholders."""

    def __init__(self, title: str, *metrics: str, log: bool = False) -> None:
        self.title, self.metrics, self.log = title, metrics, log


class PanelSection:
    """A question and the graphs for an answer."""

    def __init__(self, title: str, question: str, *panels: Panel) -> None:
        self.title, self.question, self.panels = title, question, panels


SECTIONS = (
    PanelSection(
        "Is it learning?",
        "The score of the training prompts, and of held-out prompts, which the policy does not see in training.",
        Panel("score", "rewards/score/mean"),
        Panel("held-out score", "eval/<set>/<metric>"),
        Panel("accuracy of pairs", "preference/accuracy/mean"),
        Panel("accuracy of tokens", "update/token_accuracy/mean"),
        Panel("loss", "update/loss/mean"),
    ),
    PanelSection(
        "Is it stable?",
        "How far the policy has moved from its start, how large its updates are, and whether it still explores.",
        Panel("KL from the reference", "experience/kl_ref/mean"),
        Panel("entropy", "update/entropy/mean"),
        Panel("clipped tokens", "update/clip_fraction/mean"),
        Panel("KL of an update", "update/kl_old/mean"),
        Panel("gradient norm", "update/grad_norm", "update/critic_grad_norm", log=True),
        Panel("learning rate", "update/lr", "update/critic_lr"),
        Panel("largest ratio", "update/ratio/max", log=True),
        Panel("explained variance of the critic", "update/explained_variance"),
    ),
    PanelSection(
        "Rollouts",
        "How long the responses are, how many are truncated, and how likely their tokens are.",
        Panel("response tokens", "rollouts/response_tokens/mean", "rollouts/response_tokens/max"),
        Panel("truncated responses", "rollouts/truncated/fraction"),
        Panel("logprob of a token", "rollouts/logprob/mean"),
        Panel("turns", "rollouts/turns/mean", "rollouts/turns/max"),
        Panel("tokens of a step", "rollouts/tokens/total"),
        Panel("sampler against trainer", "experience/rollout_logprob_diff/mean", "experience/kl_rollout/mean"),
        Panel("policy lag", "experience/policy_lag/mean", "experience/policy_lag/max"),
        Panel("effective samples by lag", "experience/rollout_ess_token/lag_<lag>"),
        Panel("groups in flight", "rollouts/in_flight/mean"),
        Panel("groups requested again", "rollouts/reasked_groups/total"),
        Panel("engines", "rollouts/engines"),
    ),
    PanelSection(
        "Rewards and advantages",
        "Which rewards the responses earn, and whether the responses to one prompt still differ.",
        Panel("each reward", "rewards/<name>/mean"),
        Panel("spread of the score", "rewards/score/std"),
        Panel("each criterion of a rubric", "rewards/<name>/criterion/<criterion>/mean"),
        Panel("agreement of judgements", "rewards/<name>/agreement/mean"),
        Panel("disagreement of reward models", "rewards/<name>/disagreement/mean"),
        Panel("prompts without a learning signal", "advantages/zero_groups/fraction"),
        Panel("spread of the advantages", "advantages/std"),
        Panel("failed reward calls", "rewards/errors/total"),
        Panel("margin of pairs", "preference/margin/mean"),
    ),
    PanelSection(
        "Teachers and corrections",
        "How far the policy is from its teachers, and which samples a correction leaves to the update.",
        Panel("KL from the teacher", "experience/kl_teacher/mean"),
        Panel("KL from each teacher", "experience/kl_by_teacher/<teacher>/mean"),
        Panel("divergence from the teacher", "update/divergence/mean"),
        Panel("tokens compared with the teacher", "update/compared/fraction"),
        Panel("responses with privileged context", "experience/privileged/fraction"),
        Panel("loss of given responses", "update/given_nll/mean", "update/imitation_loss/mean"),
        Panel("effective samples after weights", "experience/rollout_weight_ess"),
        Panel("rejected tokens", "experience/rollout_rejected/fraction"),
        Panel("score lost by length", "advantages/length_penalty/mean"),
    ),
    PanelSection(
        "Speed",
        "How a step spends its time.",
        Panel("seconds a step", "time/step_s"),
        Panel("seconds by stage", "time/<stage>_s"),
        Panel("tokens a second", "throughput/tokens_per_s"),
        Panel("sampled tokens a second", "throughput/rollout_tokens_per_s"),
        Panel("trained tokens a second", "throughput/train_tokens_per_s"),
        Panel("training waits for responses", "time/trainer_waits_s"),
        Panel("idle engines", "time/engines_idle/fraction"),
        Panel("model flops utilization", "throughput/mfu"),
    ),
    PanelSection(
        "Memory and nodes",
        "How much memory the roles use, how busy the machines are, and which workers were lost.",
        Panel("memory of the roles", "memory/<role>_rss_gib"),
        Panel("GPU memory of the roles", "memory/<role>_gpu_gib"),
        Panel("busy cores", "system/<node>/cpu_fraction"),
        Panel("memory of the nodes", "system/<node>/memory_gib"),
        Panel("busy GPUs", "system/<node>/gpu_fraction"),
        Panel("GPU memory of the nodes", "system/<node>/gpu_memory_gib"),
        Panel("lost workers, started again", "recovery/<role>/total"),
        Panel("seconds of recoveries", "time/recovery_s"),
    ),
    PanelSection(
        "Weight sync",
        "Whether the engines have the weights of the trainer.",
        Panel("largest difference on the probe", "weight_sync/probe_max_diff", log=True),
        Panel("version of the engines", "weight_sync/version"),
    ),
)

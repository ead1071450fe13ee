"""TRL's GRPO loss with all variants, and the trainers derived from TRL's."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rlhf.objectives import corrections, entropy, policy_loss, sequence_ratios, weighted_loss
from rlhf.objectives.aggregation import Aggregation
from rlhf.objectives.kl import kl_k3
from rlhf.objectives.masking import (
    masked_mean,
    sequence_counts,
    sequence_means,
    sequence_sums,
    to_tokens,
)
from tests.parity.adapters.aggregation import weighted
from tests.parity.case import Adapter, Arguments, Outputs, Unsupported
from tests.parity.layout import Layout, gradient

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
PER_STEP = ("dapo", "cispo", "vespo")  # divided by the tokens of the step, not by the micro-batches
MODES: dict[str, Aggregation] = {
    "grpo": "sequence_mean_token_mean",
    "sapo": "sequence_mean_token_mean",
    "bnpo": "token_mean",
    "dr_grpo": "token_sum_norm",
    "dapo": "token_mean",
    "cispo": "token_mean",
    "vespo": "token_mean",
    "luspo": "sequence_mean_token_sum",
}


def spread(layout: Layout, values: Tensor) -> Tensor:
    """[B], [B, 1] or [B, T] to flat tokens."""
    if values.ndim == 2 and values.shape[1] == layout.width > 1:
        return layout.flat(values)
    return layout.spread(values.reshape(len(layout.lengths)))


class GRPOBatch:
    """Columns, loss settings and results of a `_compute_loss`. Log-probabilities may come from a model."""

    def __init__(self, arguments: Arguments, layout: Layout, logprobs: Tensor, entropies: Tensor | None) -> None:
        self.arguments, self.layout, self.logprobs = arguments, layout, logprobs
        self.mask, self.lengths = layout.mask, layout.lengths
        self.advantages = spread(layout, arguments.tensor("advantages"))
        old = arguments.maybe("old_logps")
        self.old = logprobs.detach() if old is None else layout.flat(old)
        low = arguments.number("epsilon_low", arguments.param("epsilon", 0.2))
        high = arguments.optional("epsilon_high")
        self.clip = {"clip_low": low, "clip_high": low if high is None else high}
        self.level = arguments.choice("importance_sampling_level", {k: k for k in LEVELS}, "token")
        self.entropies = entropies
        given = arguments.tensor("advantages")
        self.one_column = layout.width == 1
        self.per_sequence = self.one_column or (self.level == "sequence" and given.numel() == len(given))
        arguments.ignore("on_policy", "token_adv")  # they say what the inputs already show

    def mean(self, values: Tensor) -> Tensor:
        """Return TRL's mean for metrics. TRL takes a single column for one value a sequence, and averages over masked
        rows too.
        """
        return values.mean() if self.one_column else masked_mean(values, self.mask)

    def shown_ratio(self) -> Tensor:
        """Return the ratio for metrics: in a single column, also the ratio of masked tokens."""
        everywhere = torch.ones_like(self.mask) if self.one_column and self.level == "token" else self.mask
        return self.ratio(everywhere)

    def ratio(self, mask: Tensor | None = None) -> Tensor:
        """The importance ratio of the level."""
        mask = self.mask if mask is None else mask
        if self.level == "token":
            return policy_loss.importance_ratio(self.logprobs, self.old, mask)
        return LEVELS[self.level](self.logprobs, self.old, mask, self.lengths)

    def kl(self) -> Tensor | None:
        """Return k3 to the reference, if beta is above 0."""
        ref = self.arguments.maybe("ref_logps")
        if self.arguments.number("beta", 0.0) == 0.0:
            return None
        if ref is None:
            raise Unsupported("beta without ref_logps")
        return kl_k3(self.logprobs, self.layout.flat(ref))

    def high_entropy(self) -> Tensor:
        """Return the tokens selected by top_entropy_quantile; all tokens at 1."""
        quantile = self.arguments.number("top_entropy_quantile", 1.0)
        if quantile >= 1.0:
            return self.mask
        if self.entropies is None:
            raise Unsupported("top_entropy_quantile without entropies")
        return trl_high_entropy(self.entropies.detach(), self.mask, 1.0 - quantile)

    def on_policy(self) -> Tensor:
        """Return the tokens left by the off-policy mask."""
        threshold = self.arguments.optional("off_policy_mask_threshold")
        sampling = self.arguments.maybe("sampling_logps")
        if threshold is None:
            return self.mask
        rollout = self.old if sampling is None else self.layout.flat(sampling)
        return trl_on_policy(self.logprobs, rollout, self.advantages, self.layout, threshold)

    def clip_metrics(self, ratio: Tensor) -> dict[str, Tensor]:
        """Return the fractions of clipped tokens in float32, as in TRL; or of clipped sequences, masked sequences
        included.
        """
        if self.per_sequence:
            ratio, advantages = self.by_sequence(ratio), self.arguments.tensor("advantages").flatten()
            everywhere = torch.ones_like(advantages, dtype=torch.bool)
            flags = policy_loss.clipped_ratios(ratio, advantages, everywhere, **self.clip)
            low, high = (flag.to(self.arguments.dtype) for flag in flags)
            means, by_sequence = (low.mean(), high.mean(), torch.maximum(low, high).mean()), (low, high)
        else:
            flags = policy_loss.clipped_ratios(ratio, self.advantages, self.mask, **self.clip)
            low, high = (flag.float() for flag in flags)
            means = tuple(masked_mean(flag, self.mask) for flag in (low, high, torch.maximum(low, high)))
            sampled = sequence_counts(self.mask, self.lengths) > 0
            by_sequence = tuple(sequence_means(flag, self.mask, self.lengths)[sampled] for flag in (low, high))
        names = ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")
        return {
            **dict(zip(names, means, strict=True)),
            "clip_ratio/low_min": by_sequence[0].min() if len(by_sequence[0]) else torch.tensor(math.nan),
            "clip_ratio/high_max": by_sequence[1].max() if len(by_sequence[1]) else torch.tensor(math.nan),
        }

    def cispo_clipped(self, ratio: Tensor) -> Tensor:
        """Return the fraction of weights held by the upper bound, counted as in clip_metrics."""
        cap = self.clip["clip_high"]
        if self.per_sequence:
            clipped = (self.by_sequence(ratio) > cap) & (self.arguments.tensor("advantages").flatten() > 0)
            return clipped.to(self.arguments.dtype).mean()
        return masked_mean(((ratio > cap) & (self.advantages > 0)).float(), self.mask)

    def by_sequence(self, ratio: Tensor) -> Tensor:
        """Reduce a column that is constant over each sequence to [B]; 1 for a fully masked row."""
        if self.one_column:
            return ratio.detach()
        masked = ratio.detach().masked_fill(~self.mask, -math.inf)
        largest = torch.segment_reduce(masked, "max", lengths=self.lengths, axis=0, initial=-math.inf)
        return largest.where(sequence_counts(self.mask, self.lengths) > 0, 1.0)

    def aggregated(self, losses: Tensor, loss_type: str) -> Tensor:
        """Aggregate over the optimizer step, with the count of each loss type."""
        arguments, rows = self.arguments, len(self.lengths)
        accumulation = arguments.number("grad_accum", 1)
        num_tokens = float(self.mask.sum()) or 1.0
        if loss_type in PER_STEP:
            items = arguments.tensor("num_items_in_batch") if arguments.has("num_items_in_batch") else None
            num_tokens = num_tokens if items is None else max(float(items), 1.0)
            num_tokens /= arguments.number("steps_per_generation", 1) * arguments.number("num_processes", 1)
        arguments.ignore("num_items_in_batch", "steps_per_generation", "num_processes")
        horizon = arguments.number("max_completion_length", 512)
        return weighted(
            losses,
            self.layout,
            MODES[loss_type],
            num_tokens=num_tokens * accumulation,
            num_sequences=rows * accumulation,
            max_new_tokens=horizon,
        )


LEVELS = {
    "token": None,
    "sequence": sequence_ratios.sequence_ratio,
    "sequence_token": sequence_ratios.sequence_token_ratio,
}


def trl_high_entropy(entropies: Tensor, mask: Tensor, quantile: float) -> Tensor:
    """TRL takes the quantile in float32 and compares in the dtype of the entropies."""
    if entropies.dtype == torch.float32:
        return entropy.high_entropy_tokens(entropies, mask, quantile=quantile)
    exact = entropy.high_entropy_tokens(entropies, mask, quantile=quantile)
    if bool(mask.any()) and not torch.equal(exact, mask & (entropies >= entropies[mask].float().quantile(quantile))):
        raise Unsupported("a float64 entropy within float32 rounding of the quantile")
    return exact


def trl_on_policy(logprobs: Tensor, rollout: Tensor, advantages: Tensor, layout: Layout, threshold: float) -> Tensor:
    """A token without a sampler's logprob (nan) says nothing about the divergence."""
    rollout = torch.where(rollout.isnan(), logprobs.detach(), rollout)
    return corrections.on_policy_sequences(logprobs, rollout, advantages, layout.mask, layout.lengths, max_kl=threshold)


def surrogate(batch: GRPOBatch, ratio: Tensor, loss_type: str) -> Tensor:
    """Return the loss terms of a loss type, and the values for metrics."""
    arguments, columns = batch.arguments, (batch.advantages, batch.mask)
    delta = arguments.optional("delta")
    temperatures = arguments.number("sapo_temperature_pos", 1.0), arguments.number("sapo_temperature_neg", 1.05)
    powers = gamma_parameters(arguments, prefix="vespo_")
    if loss_type in CLIPPED:
        if delta is None:
            return policy_loss.clipped_loss(ratio, *columns, **batch.clip)
        return policy_loss.dual_clipped_loss(ratio, *columns, **batch.clip, max_ratio=delta)
    if loss_type == "cispo":
        cap = batch.clip["clip_high"]
        return weighted_loss.cispo(ratio, batch.logprobs, *columns, min_ratio=0.0, max_ratio=cap)
    if loss_type == "sapo":
        positive, negative = temperatures
        return weighted_loss.sapo(ratio, *columns, temperature_positive=positive, temperature_negative=negative)
    weights = vespo_weights(batch, powers)
    return policy_loss.reinforce(batch.logprobs, weights * batch.advantages, batch.mask)


def gamma_parameters(arguments: Arguments, prefix: str) -> dict[str, float]:
    """VESPO's powers and decays, in our names."""
    return {
        "power_positive": arguments.number(f"{prefix}k_pos", 2.0),
        "decay_positive": max(arguments.number(f"{prefix}lambda_pos", 3.0), 1e-4),
        "power_negative": arguments.number(f"{prefix}k_neg", 3.0),
        "decay_negative": max(arguments.number(f"{prefix}lambda_neg", 2.0), 1e-4),
    }


def vespo_log_ratio(batch: GRPOBatch) -> Tensor:
    """[B] log-ratio summed over each sequence, and the sampler's over each row, masked or not."""
    held = (batch.logprobs - batch.old).detach().clamp(-20.0, 20.0)
    log_ratio = sequence_sums(torch.where(batch.mask, held, 0.0), batch.lengths)
    sampler = batch.arguments.maybe("importance_sampling_ratio")
    return log_ratio if sampler is None else log_ratio + sampler.log().clamp(math.log(1e-8), 20.0).sum(-1)


def vespo_weights(batch: GRPOBatch, powers: Mapping[str, float]) -> Tensor:
    """On each token."""
    return weighted_loss.vespo_weights(batch.layout.spread(vespo_log_ratio(batch)), batch.advantages, **powers)


def vespo_mean(batch: GRPOBatch, powers: Mapping[str, float]) -> Tensor:
    """Average over sequences with a single advantage each, else over tokens."""
    advantages = batch.arguments.tensor("advantages")
    if advantages.numel() > len(advantages):
        return masked_mean(vespo_weights(batch, powers), batch.mask)
    return weighted_loss.vespo_weights(vespo_log_ratio(batch), advantages.flatten(), **powers).mean()


def compute_loss(
    arguments: Arguments, layout: Layout, logprobs: Tensor, entropies: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of TRL's `GRPOTrainer._compute_loss`; the columns are flat."""
    batch = GRPOBatch(arguments, layout, logprobs, entropies)
    loss_type = arguments.choice("loss_type", {k: k for k in MODES}, "dapo")
    ratio, kl = batch.ratio(), batch.kl()
    losses = surrogate(batch, ratio, loss_type)
    high_entropy = batch.high_entropy()
    losses = torch.where(batch.on_policy() & high_entropy, losses, 0.0)
    sampler = arguments.maybe("importance_sampling_ratio")
    if arguments.flag("use_is", sampler is not None) and loss_type != "vespo":
        if sampler is None:
            raise Unsupported("use_is without importance_sampling_ratio")
        losses = losses * spread(layout, sampler)
    metrics: dict[str, Tensor] = {}
    biased = not arguments.flag("use_bias_correction_kl", arguments.case.peer != "trl_snap")
    if kl is not None:
        penalty = kl if biased else kl * ratio
        losses = losses + torch.where(batch.mask, arguments.number("beta") * penalty, 0.0)
        metrics["kl"] = batch.mean(kl if biased else kl * batch.shown_ratio())
    loss = batch.aggregated(losses, loss_type)
    if entropies is not None:
        coef, next_coef = entropy_coefs(arguments, masked_mean(entropies.detach(), high_entropy))
        accumulation = arguments.number("grad_accum", 1)
        metrics["entropy"], metrics["entropy_coef"] = (
            batch.mean(entropies),
            torch.tensor(next_coef, dtype=torch.float64),
        )
        metrics["policy_loss"] = loss if loss_type in PER_STEP else loss * accumulation
        loss = loss - coef * masked_mean(entropies, high_entropy) / accumulation
    if loss_type in CLIPPED:
        delta = arguments.optional("delta")
        metrics |= batch.clip_metrics(batch.shown_ratio().clamp(max=math.inf if delta is None else delta))
    elif loss_type == "cispo":
        metrics["cispo_clip_ratio"] = batch.cispo_clipped(batch.shown_ratio())
    elif loss_type == "vespo":
        metrics["vespo/phi_seq_mean"] = vespo_mean(batch, gamma_parameters(arguments, "vespo_"))
    return loss, metrics


def entropy_coefs(arguments: Arguments, measured: Tensor) -> tuple[float, float]:
    """Return the coefficient of TRL's entropy bonus in this step, and the controller's coefficient for the next step.

    The adaptive controller applies no bonus until an earlier step has measured an entropy at or below the target.
    """
    coef = arguments.number("entropy_coef", 0.0)
    if not arguments.flag("use_adaptive_entropy", False):
        return coef, coef
    target, delta = arguments.number("entropy_target", 0.2), arguments.number("entropy_coef_delta", 0.005)
    low, high = arguments.number("entropy_coef_min", 0.0), arguments.number("entropy_coef_max", 1.0)
    applied = coef if arguments.number("last_world_entropy", math.inf) <= target else 0.0
    return applied, min(coef + delta, high) if measured.item() <= target else max(coef - delta, low)


def trl_layout(arguments: Arguments) -> Layout:
    """Return the layout of the sampled tokens: the completion mask without the tokens written by tools.

    In a batch of one column the masked rows stay, because TRL's metrics count these rows.
    """
    mask = arguments.mask("mask")
    sampled = mask & arguments.mask_or_all("tool_mask", mask.shape)
    return Layout(sampled, keep_padding=mask.shape[1] == 1)


def trl_entropies(arguments: Arguments, layout: Layout) -> Tensor | None:
    """Return the entropies of the tokens, flat, or None where the case has none."""
    entropies = arguments.maybe("entropies")
    return None if entropies is None else layout.flat(entropies)


def trl_grpo_loss(arguments: Arguments) -> Outputs:
    """Compute the loss from given log-probabilities and entropies."""
    logprobs, layout = arguments.variable("logps"), trl_layout(arguments)
    entropies = arguments.variable("entropies") if arguments.has("entropies") else None
    flat_entropies = None if entropies is None else layout.flat(entropies)
    loss, metrics = compute_loss(arguments, layout, layout.flat(logprobs), flat_entropies)
    gradients = {} if entropies is None else {"grad_entropies": gradient(loss, entropies)}
    return {"loss": loss, "grad_logps": gradient(loss, logprobs), **gradients, **metrics}


def trl_gmpo_loss(arguments: Arguments) -> Outputs:
    """Return GMPO's loss: the geometric mean of clipped ratios; the clip metrics belong to the log-ratio."""
    logprobs, layout = arguments.variable("logps"), trl_layout(arguments)
    batch = GRPOBatch(arguments, layout, layout.flat(logprobs), trl_entropies(arguments, layout))
    batch.per_sequence = batch.one_column
    arguments.ignore("importance_sampling_level", "use_bias_correction_kl", "loss_type", "delta")
    kept = batch.high_entropy()
    ratio = sequence_ratios.geometric_mean_ratio(
        batch.logprobs, batch.old, batch.advantages, kept, batch.lengths, **batch.clip
    )
    # A sequence's one term stands on each of its kept tokens, or on all of them if none is kept (the ratio is then 1).
    counts = [sequence_counts(mask, batch.lengths).to(ratio.dtype) for mask in (batch.mask, kept)]
    share = torch.where(counts[1] > 0, counts[0] / counts[1].clamp(min=1.0), 1.0)
    carries = kept | layout.spread(counts[1] == 0)
    losses = torch.where(batch.mask & carries, -ratio * batch.advantages * layout.spread(share), 0.0)
    kl, metrics = batch.kl(), {}
    if kl is not None:
        losses = losses + torch.where(batch.mask, arguments.number("beta") * kl, 0.0)
        metrics["kl"] = batch.mean(kl)
    # TRL counts a fully masked row with the ratio 1: a constant.
    idle = arguments.tensor("advantages").flatten()[counts[0] == 0].sum()
    loss = batch.aggregated(losses, "grpo") - idle / (len(counts[0]) * arguments.number("grad_accum", 1))
    if batch.entropies is not None:
        metrics["entropy"] = batch.mean(batch.entropies)
    log_ratio = torch.where(batch.mask | batch.one_column, batch.logprobs - batch.old, 0.0)
    return {"loss": loss, "grad_logps": gradient(loss, logprobs), **batch.clip_metrics(1.0 + log_ratio), **metrics}


def trl_async_grpo_loss(arguments: Arguments) -> Outputs:
    """Return the loss on flat columns: sequences are runs of a segment id."""
    logprobs, old = arguments.variable("flat_logps"), arguments.tensor("flat_old_logps")
    advantages, mask = arguments.tensor("flat_advantages"), torch.ones(len(logprobs), dtype=torch.bool)
    lengths = arguments.integers("segment_id").unique_consecutive(return_counts=True)[1]
    low, high = arguments.number("epsilon_low", 0.2), arguments.optional("epsilon_high")
    clip = {"clip_low": low, "clip_high": low if high is None else high}
    ratio = policy_loss.importance_ratio(logprobs, old, mask)
    losses = policy_loss.clipped_loss(ratio, advantages, mask, **clip)
    tokens = max(arguments.number("global_n_tokens") / arguments.number("num_processes", 1), 1.0)
    accumulation = arguments.number("grad_accum", 1)
    layout = Layout(mask[None])
    loss = weighted(losses, layout, "token_mean", num_tokens=tokens * accumulation, num_sequences=1)
    low_flags, high_flags = (f.float() for f in policy_loss.clipped_ratios(ratio, advantages, mask, **clip))
    return {
        "loss": loss,
        "grad_flat_logps": gradient(loss, logprobs),
        "ratio": policy_loss.importance_ratio(logprobs, old, mask).mean(),
        "kl": kl_k3(old, logprobs).mean(),
        "entropy": arguments.tensor("flat_entropies").mean(),
        "clip_ratio/low_mean": low_flags.mean(),
        "clip_ratio/high_mean": high_flags.mean(),
        "clip_ratio/region_mean": torch.maximum(low_flags, high_flags).mean(),
        "clip_ratio/low_min": sequence_means(low_flags, mask, lengths).min(),
        "clip_ratio/high_max": sequence_means(high_flags, mask, lengths).max(),
    }


def trl_gamma_weights(arguments: Arguments) -> Outputs:
    """Return VESPO's weights, one per sequence."""
    mask, advantages = arguments.mask("mask"), arguments.tensor("advantages")
    layout = Layout(mask)
    held = layout.flat(arguments.tensor("log_ratio").clamp(-20.0, 20.0))
    log_ratio = sequence_sums(torch.where(layout.mask, held, 0.0), layout.lengths)[:, None]
    sampler = arguments.maybe("importance_sampling_ratio")
    if sampler is not None:
        log_ratio = log_ratio + sampler.log().clamp(math.log(1e-8), 20.0).sum(-1, keepdim=True)
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    powers = gamma_parameters(arguments, prefix="")
    return {"phi_seq": weighted_loss.vespo_weights(log_ratio.expand_as(advantages), advantages, **powers)}


def trl_high_entropy_mask(arguments: Arguments) -> Outputs:
    """Tokens at or above the quantile."""
    mask = arguments.mask("mask")
    return {"entropy_mask": trl_high_entropy(arguments.tensor("entropies"), mask, arguments.number("threshold"))}


def trl_off_policy_mask(arguments: Arguments) -> Outputs:
    """Return a flag per sequence, for sequences with a single advantage."""
    mask = arguments.mask("mask")
    advantages = arguments.tensor("advantages")
    if advantages.numel() != len(mask):
        raise Unsupported("one flag a sequence needs one advantage a sequence")
    layout = Layout(mask)
    threshold = arguments.number("off_policy_threshold")
    kept = trl_on_policy(
        layout.flat(arguments.tensor("logps")),
        layout.flat(arguments.tensor("sampling_logps")),
        to_tokens(advantages.flatten(), layout.lengths, num_tokens=len(layout.mask)),
        layout,
        threshold,
    )
    # A fully masked row has no tokens to keep; TRL gives it the divergence 0.
    empty = (sequence_counts(layout.mask, layout.lengths) == 0) & ((advantages.flatten() >= 0) | (threshold >= 0))
    return {"keep_mask": (empty | (sequence_counts(kept, layout.lengths) > 0))[:, None]}


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("trl_snap", "GRPOTrainer._compute_loss"): trl_grpo_loss,
    ("trl", "GMPOTrainer._compute_loss"): trl_gmpo_loss,
    ("trl", "AsyncGRPOTrainer.compute_loss"): trl_async_grpo_loss,
    ("trl", "GRPOTrainer.get_gamma_weights"): trl_gamma_weights,
    ("trl", "GRPOTrainer.get_high_entropy_mask"): trl_high_entropy_mask,
    ("trl", "GRPOTrainer.get_off_policy_mask"): trl_off_policy_mask,
}

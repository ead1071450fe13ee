"""Compare losses of pairs: TRL's DPO with its variants, CPO, SimPO, AlphaPO, ORPO and TPO; OpenRLHF's DPO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlhf.objectives import divergences, preference_loss
from rlhf.objectives.masking import masked_mean, sequence_counts, sequence_means, sequence_sums
from rlhf.objectives.sequence_logprobs import length_desensitized_total, on_policy_weights
from rlhf.objectives.supervised import negative_logprob
from tests.parity.adapters.tiny_llama import load, parameter_gradients, token_columns
from tests.parity.case import Adapter, Arguments, Outputs, Unsupported
from tests.parity.layout import Layout, gradient
from tests.plain_logits import (
    collision_logprob_from_logits,
    entropy_from_logits,
    is_top1_from_logits,
    logprobs_from_logits,
)

COLLISIONS = ("policy_log_sum_sq_probs", "log_sum_sq_probs")  # of the sampled tokens' distributions, for WPO


def sequence_total(values: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
    """Of the counted tokens of each response."""
    return sequence_sums(torch.where(mask, values, 0.0), lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """The inputs of the losses of TRL's DPO, an entry per pair."""

    chosen: Tensor
    """Log-ratios."""
    rejected: Tensor
    chosen_scores: Tensor
    """Log-ratios under the f-divergence."""
    rejected_scores: Tensor
    chosen_average: Tensor
    """Scores over the length of the completion."""
    rejected_average: Tensor
    margins: Tensor
    ref_margins: Tensor
    chosen_logprobs: Tensor
    rejected_logprobs: Tensor
    chosen_nll: Tensor
    """Mean over the chosen tokens of all pairs, repeated."""
    weights: Tensor
    """WPO's, or 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """[2B, T] arrays of chosen, then rejected rows. completion_mask has another column on the left."""

    logprobs: Tensor
    ref_logprobs: Tensor
    completion_mask: Tensor
    collision_logprobs: Tensor | None

    def pair(self, index: int) -> Columns:
        """Return a single pair."""
        rows = [index, index + len(self.logprobs) // 2]
        collisions = None if self.collision_logprobs is None else self.collision_logprobs[rows]
        return Columns(
            logprobs=self.logprobs[rows],
            ref_logprobs=self.ref_logprobs[rows],
            completion_mask=self.completion_mask[rows],
            collision_logprobs=collisions,
        )


class DPOSettings:
    """The parameters of TRL's DPOConfig for the loss, and the loss."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        named = arguments.param("loss_type", "sigmoid")
        self.names: list[str] = named if isinstance(named, list) else [named]
        given = arguments.param("loss_weights", None)
        self.shares = [1.0] * len(self.names) if given is None else [float(share) for share in given]
        self.beta = arguments.number("beta", 0.1)
        self.label_smoothing = arguments.number("label_smoothing", 0.0)
        self.ld_alpha = arguments.optional("ld_alpha")
        self.tau = arguments.number("discopop_tau", 0.05)
        self.use_weighting = arguments.flag("use_weighting", False)
        alpha = arguments.number("f_alpha_divergence_coef", 0.5)
        scores: Mapping[str, Callable[[Tensor], Tensor]] = {
            "reverse_kl": lambda log_ratios: log_ratios,
            "forward_kl": divergences.forward_kl_scores,
            "js_divergence": divergences.jensen_shannon_scores,
            "alpha_divergence": partial(divergences.alpha_divergence_scores, alpha=alpha),
        }
        self.scores = arguments.choice("f_divergence_type", scores, "reverse_kl")
        if unknown := [name for name in self.names if name not in DPO_LOSSES]:
            raise Unsupported(f"loss_type {unknown}")

    def totals(self, values: Tensor, completion: Tensor) -> Tensor:
        """Return a number per row. TRL sums masked positions too: TRL's own columns are zero there."""
        if self.ld_alpha is None:
            everything = Layout.full(values.shape)
            return sequence_total(everything.flat(values), everything.mask, everything.lengths)
        layout = Layout(completion)
        shared = torch.minimum(*sequence_counts(layout.mask, layout.lengths).chunk(2)).repeat(2)
        flat = layout.flat(values)
        found = length_desensitized_total(flat, layout.mask, layout.lengths, shared, alpha=self.ld_alpha)
        return found + self.padding(values, completion, shared)

    def padding(self, values: Tensor, completion: Tensor, shared: Tensor) -> Tensor:
        """TRL's LD-DPO weighs the padding after a completion too: zeros, but visible in the gradient."""
        position = completion.cumsum(1)
        kept, surplus = values.new_tensor([1.0, self.ld_alpha or 0.0])
        weights = torch.where(position <= shared[:, None], kept, surplus)
        return torch.where((position > 0) & ~completion, weights * values, 0.0).sum(1)

    def pairs(self, columns: Columns) -> Pairs:
        """From token columns."""
        completion = columns.completion_mask[:, 1:]
        policy = self.totals(columns.logprobs, completion)
        reference = self.totals(columns.ref_logprobs, completion)
        scores = self.scores(policy - reference)
        averages = scores / columns.completion_mask.sum(1).clamp(min=1)
        (chosen, rejected), (ref_chosen, ref_rejected) = policy.chunk(2), reference.chunk(2)
        layout = Layout(completion.chunk(2)[0])
        nll = masked_mean(negative_logprob(layout.flat(columns.logprobs.chunk(2)[0]), layout.mask), layout.mask)
        return Pairs(
            chosen=chosen - ref_chosen,
            rejected=rejected - ref_rejected,
            chosen_scores=scores.chunk(2)[0],
            rejected_scores=scores.chunk(2)[1],
            chosen_average=averages.chunk(2)[0],
            rejected_average=averages.chunk(2)[1],
            margins=chosen - rejected,
            ref_margins=ref_chosen - ref_rejected,
            chosen_logprobs=chosen,
            rejected_logprobs=rejected,
            chosen_nll=nll.expand(len(chosen)),
            weights=self.weights(columns, completion),
        )

    def weights(self, columns: Columns, completion: Tensor) -> Tensor:
        """The product over the pair."""
        if not self.use_weighting:
            return torch.ones(len(completion) // 2, dtype=columns.logprobs.dtype)
        if columns.collision_logprobs is None:
            raise Unsupported("use_weighting without the collision probabilities")
        layout = Layout(completion)
        flat = layout.flat(columns.logprobs), layout.flat(columns.collision_logprobs)
        chosen, rejected = on_policy_weights(*flat, layout.mask, layout.lengths).chunk(2)
        return chosen * rejected

    def losses(self, pairs: Pairs) -> Tensor:
        """Return the weighted mixture, one value per pair."""
        terms = [
            share * DPO_LOSSES[name](self, pairs) * pairs.weights
            for name, share in zip(self.names, self.shares, strict=True)
        ]
        return torch.stack(terms).sum(0)


DPOTerm = Callable[[DPOSettings, Pairs], Tensor]


def of_scores(loss: Callable[..., Tensor]) -> DPOTerm:
    """Read the scores under any f-divergence."""
    return lambda settings, pairs: loss(pairs.chosen_scores, pairs.rejected_scores, beta=settings.beta)


def of_averages(loss: Callable[..., Tensor]) -> DPOTerm:
    """Reads scores over lengths."""
    return lambda settings, pairs: loss(pairs.chosen_average, pairs.rejected_average, beta=settings.beta)


def of_ratios(loss: Callable[..., Tensor]) -> DPOTerm:
    """Reads log-ratios alone."""
    return lambda settings, pairs: loss(pairs.chosen, pairs.rejected, beta=settings.beta)


def exo_pair(settings: DPOSettings, pairs: Pairs) -> Tensor:
    """TRL takes the logarithms of the preference in float32: this adds the same rounding.

    The last bit of a float32 logarithm depends on the vector instructions of the processor. The case's tolerance
    therefore
    grows by a unit in the last place of the larger logarithm, in any dtype of the case.
    """
    scores, epsilon = (pairs.chosen_scores, pairs.rejected_scores), torch.tensor(settings.label_smoothing)
    rounded, smoothing = torch.stack([torch.log1p(-epsilon), torch.log(epsilon)]), epsilon.item()
    last_place = torch.finfo(torch.float32).eps * rounded.abs().max().item()
    settings.arguments.rounding = last_place * max(1.0, settings.beta / 2)  # the gradient has a factor of beta / 2
    exact = scores[0].new_tensor([1.0 - smoothing, smoothing]).log()
    loss = preference_loss.exo_pair(*scores, beta=settings.beta, label_smoothing=smoothing)
    chosen = (settings.beta * (scores[0] - scores[1])).sigmoid()
    return loss + chosen * (exact - rounded)[0] + (1.0 - chosen) * (exact - rounded)[1]


def smoothed(loss: Callable[..., Tensor], first: str, second: str) -> DPOTerm:
    """With label smoothing, of two fields of the pairs."""
    return lambda settings, pairs: loss(
        getattr(pairs, first), getattr(pairs, second), beta=settings.beta, label_smoothing=settings.label_smoothing
    )


def discopop(settings: DPOSettings, pairs: Pairs) -> Tensor:
    """Return DiscoPOP's loss with temperature tau."""
    scores = pairs.chosen_scores, pairs.rejected_scores
    return preference_loss.discopop(*scores, beta=settings.beta, temperature=settings.tau)


DPO_LOSSES: dict[str, DPOTerm] = {
    "sigmoid": of_scores(preference_loss.dpo),  # without label smoothing, which TRL ignores here
    "hinge": of_scores(preference_loss.hinge),
    "ipo": of_averages(preference_loss.ipo),
    "sigmoid_norm": of_averages(preference_loss.dpo),
    "exo_pair": exo_pair,
    "nca_pair": of_ratios(preference_loss.nca_pair),
    "robust": smoothed(preference_loss.robust_dpo, "chosen_scores", "rejected_scores"),
    "bco_pair": of_ratios(partial(preference_loss.bco_pair, delta=0.0)),
    "sppo_hard": of_ratios(preference_loss.sppo_hard),
    "aot": smoothed(preference_loss.aot, "margins", "ref_margins"),
    "aot_unpaired": smoothed(preference_loss.aot_unpaired, "chosen", "rejected"),
    "apo_zero": of_ratios(preference_loss.apo_zero),
    "apo_down": of_ratios(preference_loss.apo_down),
    "discopop": discopop,
    "sft": lambda settings, pairs: pairs.chosen_nll,
}


def reward_metrics(chosen: Tensor, rejected: Tensor, *, beta: float) -> dict[str, Tensor]:
    """Return TRL's metrics of the implicit rewards."""
    chosen, rejected = beta * chosen.detach(), beta * rejected.detach()
    return {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (chosen > rejected).float().mean(),
        "rewards/margins": (chosen - rejected).mean(),
    }


def logprob_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Return TRL's metrics of the sequences' log-probabilities."""
    return {"logps/chosen": chosen.mean(), "logps/rejected": rejected.mean()}


def trl_dpo(arguments: Arguments) -> Outputs:
    """From given columns of log-probabilities, or through the tiny model."""
    if arguments.has("input_ids"):
        return trl_dpo_tiny(arguments)
    settings, logprobs = DPOSettings(arguments), arguments.variable("policy_per_token_logps")
    # the sums and lengths of the same columns
    arguments.ignore(*(f"{kind}_{row}" for row in ("logps", "lengths") for kind in ("chosen", "rejected")))
    arguments.ignore("ref_chosen_logps", "ref_rejected_logps", *COLLISIONS)
    collisions = [arguments.tensor(name) for name in COLLISIONS if arguments.has(name)]
    columns = Columns(
        logprobs=logprobs,
        ref_logprobs=arguments.tensor("ref_per_token_logps"),
        completion_mask=arguments.mask("completion_mask"),
        collision_logprobs=collisions[0] if collisions else None,
    )
    pairs = settings.pairs(columns)
    loss = settings.losses(pairs).mean()
    alone = [settings.losses(settings.pairs(columns.pair(i))) for i in range(len(logprobs) // 2)]
    return {
        "loss": loss,
        "grad_policy_per_token_logps": gradient(loss, logprobs),
        "per_pair_loss": torch.cat(alone),
        **reward_metrics(pairs.chosen, pairs.rejected, beta=settings.beta),
        **logprob_metrics(pairs.chosen_logprobs, pairs.rejected_logprobs),
    }


def trl_dpo_tiny(arguments: Arguments) -> Outputs:
    """From token ids."""
    settings = DPOSettings(arguments)
    ids, attended = arguments.integers("input_ids"), arguments.mask("attention_mask")
    completion = arguments.mask("completion_mask")
    model, reference = load(arguments, "policy_state_dict"), load(arguments, "ref_state_dict")
    logprobs, entropies, top1 = token_columns(model, ids, attended)
    with torch.no_grad():
        ref_logprobs = token_columns(reference, ids, attended)[0]
        mean_logits = next_token_mean_logits(model, ids, attended)
        collisions = next_token_collisions(model, ids, attended)
    shifted = completion[:, 1:]
    columns = Columns(
        logprobs=torch.where(shifted, logprobs[:, 1:], 0.0),
        ref_logprobs=torch.where(shifted, ref_logprobs[:, 1:], 0.0),
        completion_mask=completion,
        collision_logprobs=collisions[:, 1:],
    )
    pairs = settings.pairs(columns)
    loss = settings.losses(pairs).mean()
    masks, logits = shifted.chunk(2), mean_logits[:, 1:].chunk(2)
    return {
        "loss": loss,
        **parameter_gradients(loss, model),
        "entropy": masked_mean(entropies[:, 1:], shifted),
        "num_tokens": float(attended.sum()),
        "logits/chosen": masked_mean(logits[0], masks[0]),
        "logits/rejected": masked_mean(logits[1], masks[1]),
        "mean_token_accuracy": masked_mean(top1[:, 1:].chunk(2)[0].float(), masks[0]),
        **reward_metrics(pairs.chosen, pairs.rejected, beta=settings.beta),
        **logprob_metrics(pairs.chosen_logprobs, pairs.rejected_logprobs),
    }


def next_token_rows(model: torch.nn.Module, ids: Tensor, attended: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """Return [B, L] of a function of the logits behind each token; zero for the first token and for padding."""
    columns = torch.zeros(ids.shape, dtype=next(model.parameters()).dtype)
    for row, (tokens, kept) in enumerate(zip(ids, attended, strict=True)):
        places = kept.nonzero().flatten()
        columns[row, places[1:]] = of(model(input_ids=tokens[places][None]).logits[0, :-1])
    return columns


def next_token_mean_logits(model: torch.nn.Module, ids: Tensor, attended: Tensor) -> Tensor:
    """Return a statistic from TRL's log."""
    return next_token_rows(model, ids, attended, lambda logits: logits.mean(-1))


def next_token_collisions(model: torch.nn.Module, ids: Tensor, attended: Tensor) -> Tensor:
    """For WPO."""
    return next_token_rows(model, ids, attended, collision_logprob_from_logits)


def trl_cpo(arguments: Arguments) -> Outputs:
    """CPO, SimPO and, with alpha, AlphaPO. Averages or sums come in; total_loss adds the supervised term."""
    chosen, rejected = arguments.variable("chosen_logps"), arguments.variable("rejected_logps")
    name, beta, alpha = (
        arguments.param("loss_type", "sigmoid"),
        arguments.number("beta", 0.1),
        arguments.number("alpha", 0.0),
    )
    smoothing, gamma = arguments.number("label_smoothing", 0.0), arguments.number("simpo_gamma", 0.5)
    scores = [divergences.alphapo_scores(logprobs, alpha=alpha) for logprobs in (chosen, rejected)]
    losses = contrastive(name, *scores, beta=beta, gamma=gamma, label_smoothing=smoothing)
    loss = losses.mean()
    supervised = arguments.tensor("nll_loss") if arguments.has("nll_loss") else torch.tensor(0.0)
    return {
        "losses": losses,
        "chosen_rewards": beta * scores[0],
        "rejected_rewards": beta * scores[1],
        "total_loss": loss + arguments.number("cpo_alpha", 1.0) * supervised,
        "grad_chosen": gradient(loss, chosen),
        "grad_rejected": gradient(loss, rejected),
    }


def contrastive(
    name: str, chosen: Tensor, rejected: Tensor, *, beta: float, gamma: float, label_smoothing: float
) -> Tensor:
    """Return the reference-free losses common to CPO and TPO."""
    if name == "sigmoid":
        return preference_loss.dpo(chosen, rejected, beta=beta, label_smoothing=label_smoothing)
    if name == "hinge":
        return preference_loss.hinge(chosen, rejected, beta=beta)
    if name == "ipo":
        return preference_loss.ipo(chosen, rejected, beta=beta)
    if name in ("simpo", "tpo-l"):
        return preference_loss.simpo(chosen, rejected, beta=beta, gamma=gamma, label_smoothing=label_smoothing)
    raise Unsupported(f"loss_type {name!r}")


def trl_orpo(arguments: Arguments) -> Outputs:
    """TRL's losses are beta * log sigmoid, to be subtracted."""
    chosen, rejected = arguments.variable("chosen_avg_logps"), arguments.variable("rejected_avg_logps")
    beta = arguments.number("beta", 0.1)
    terms = preference_loss.odds_ratio(chosen, rejected)
    loss = (beta * terms).mean()
    supervised = arguments.tensor("nll_loss") if arguments.has("nll_loss") else torch.tensor(0.0)
    return {
        "losses": -beta * terms,
        "chosen_rewards": beta * chosen,
        "rejected_rewards": beta * rejected,
        "log_odds_ratio_mean": -terms.mean(),
        "log_odds_chosen_mean": (preference_loss.log_odds(chosen) - preference_loss.log_odds(rejected)).mean(),
        "total_loss": supervised + loss,
        "grad_chosen": gradient(loss, chosen),
        "grad_rejected": gradient(loss, rejected),
    }


def trl_tpo(arguments: Arguments) -> Outputs:
    """Rows are chosen, rejected and, unless tpo_alpha is 0, gold responses."""
    variable, ids = arguments.variable("logits"), arguments.integers("input_ids")
    mask = arguments.mask("completion_mask")[:, 1:]
    name, beta = arguments.param("loss_type", "sigmoid"), arguments.number("beta", 0.01)
    alpha, branches = arguments.number("tpo_alpha", 1.0), 3 if arguments.number("tpo_alpha", 1.0) != 0.0 else 2
    gamma, smoothing = arguments.number("tpo_l_gamma", 0.5), arguments.number("label_smoothing", 0.0)
    logits, targets = variable[:, :-1], ids[:, 1:]
    layout, columns = Layout(mask), logprobs_from_logits(logits, targets)
    reduce = sequence_means if name in ("ipo", "tpo-l") else sequence_total
    chosen, rejected = reduce(layout.flat(columns), layout.mask, layout.lengths).chunk(branches)[:2]
    loss = contrastive(name, chosen, rejected, beta=beta, gamma=gamma, label_smoothing=smoothing).mean()
    masks, logit_means = mask.chunk(branches), logits.detach().mean(-1).chunk(branches)
    if branches == 3:
        gold = negative_logprob(columns.chunk(branches)[2], masks[2])
        loss = loss + alpha * masked_mean(gold, masks[2])
    top1 = is_top1_from_logits(logits, targets).chunk(branches)[0]
    return {
        "loss": loss,
        "grad_logits": gradient(loss, variable),
        "entropy": masked_mean(entropy_from_logits(logits), mask),
        "num_tokens": float(ids.numel()),
        "logits/chosen": masked_mean(logit_means[0], masks[0]),
        "logits/rejected": masked_mean(logit_means[1], masks[1]),
        "mean_token_accuracy": masked_mean(top1.float(), masks[0]),
        **reward_metrics(chosen, rejected, beta=beta),
        **logprob_metrics(chosen, rejected),
    }


def openrlhf_dpo(arguments: Arguments) -> Outputs:
    """cDPO, or IPO of summed log-ratios."""
    chosen, rejected = arguments.variable("chosen_logps"), arguments.variable("rejected_logps")
    ratios = chosen - arguments.tensor("ref_chosen_logps"), rejected - arguments.tensor("ref_rejected_logps")
    beta, smoothing = arguments.number("beta"), arguments.number("label_smoothing", 0.0)
    if arguments.flag("ipo", False):
        losses = preference_loss.ipo(*ratios, beta=beta)
    else:
        losses = preference_loss.dpo(*ratios, beta=beta, label_smoothing=smoothing)
    loss = losses.mean()
    return {
        "loss": loss,
        "per_pair_loss": losses,
        "chosen_rewards": beta * ratios[0],
        "rejected_rewards": beta * ratios[1],
        "grad_chosen": gradient(loss, chosen),
        "grad_rejected": gradient(loss, rejected),
    }


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("trl", "DPOTrainer._compute_loss"): trl_dpo,
    ("trl", "CPOTrainer.cpo_loss"): trl_cpo,
    ("trl", "ORPOTrainer.odds_ratio_loss"): trl_orpo,
    ("trl", "TPOTrainer._compute_loss"): trl_tpo,
    ("openrlhf", "DPOLoss.forward"): openrlhf_dpo,
}

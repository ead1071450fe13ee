"""Compare losses of pairs: TRL's DPO with its variants, CPO, SimPO, AlphaPO, ORPO and TPO; OpenRLHF's DPO."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlhf.objectives import divergences, preference_loss
from rlhf.objectives.masking import sequence_means, sequence_sums
from rlhf.objectives.sequence_logprobs import length_desensitized_total, on_policy_weights
from rlhf.objectives.supervised import negative_logprob
from tests.parity.adapters.tiny_llama import load, parameter_gradients, token_columns
from tests.parity.case import Adapter, Arguments, Outputs
from tests.parity.layout import Layout, gradient
from tests.plain_logits import (
    entropy_from_logits,
    is_top1_from_logits,
    logprobs_from_logits,
    masked_mean,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """The inputs of the losses of TRL's DPO. Each has the chosen, then the rejected values of the pairs."""

    ratios: tuple[Tensor, ...]
    scores: tuple[Tensor, ...]  # log-ratios under the f-divergence
    averages: tuple[Tensor, ...]  # scores over the length of the completion
    logprobs: tuple[Tensor, ...]
    margins: tuple[Tensor, ...]  # of the policy and of the reference
    chosen_nll: Tensor  # mean over the chosen tokens of all pairs, repeated
    weights: Tensor  # WPO's, or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """[2B, T] arrays of chosen, then rejected rows. completion_mask has another column on the left."""

    logprobs: Tensor
    ref_logprobs: Tensor
    completion_mask: Tensor
    collision_logprobs: Tensor

    def pair(self, index: int) -> Columns:
        """Return a single pair."""
        rows = [index, index + len(self.logprobs) // 2]
        return Columns(**{name: getattr(self, name)[rows] for name in self.__slots__})  # type: ignore[attr-defined]


class DPOSettings:
    """The parameters of TRL's DPOConfig for the loss, and the loss."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        named = arguments.param("loss_type", "sigmoid")
        self.names: list[str] = named if isinstance(named, list) else [named]
        self.shares = arguments.param("loss_weights", None) or [1.0] * len(self.names)
        self.beta = arguments.number("beta", 0.1)
        self.smoothing = {"label_smoothing": arguments.number("label_smoothing", 0.0)}
        self.ld_alpha = arguments.optional("ld_alpha")
        self.tau = arguments.number("discopop_tau", 0.05)
        self.use_weighting = arguments.param("use_weighting", False)
        alpha = arguments.number("f_alpha_divergence_coef", 0.5)
        scores: Mapping[str, Callable[[Tensor], Tensor]] = {
            "reverse_kl": lambda log_ratios: log_ratios,
            "forward_kl": divergences.forward_kl_scores,
            "js_divergence": divergences.jensen_shannon_scores,
            "alpha_divergence": partial(divergences.alpha_divergence_scores, alpha=alpha),
        }
        self.scores = scores[arguments.param("f_divergence_type", "reverse_kl")]

    def totals(self, values: Tensor, completion: Tensor) -> Tensor:
        """Return a number per row. TRL sums masked positions too: TRL's own columns are zero there."""
        if self.ld_alpha is None:
            everything = Layout.full(values.shape)
            return sequence_sums(everything.flat(values), everything.lengths)
        layout = Layout(completion)
        shared = torch.minimum(*layout.counts.chunk(2)).repeat(2)
        columns = (layout.flat(values), layout.mask, layout.lengths, shared)
        return length_desensitized_total(*columns, alpha=self.ld_alpha) + self.padding(values, completion, shared)

    def padding(self, values: Tensor, completion: Tensor, shared: Tensor) -> Tensor:
        """TRL's LD-DPO weighs the padding after a completion too: zeros, but visible in the gradient."""
        position = completion.cumsum(1)
        kept, surplus = values.new_tensor([1.0, self.ld_alpha or 0.0])
        weights = torch.where(position <= shared[:, None], kept, surplus)
        return torch.where((position > 0) & ~completion, weights * values, 0.0).sum(1)

    def pairs(self, columns: Columns) -> Pairs:
        completion = columns.completion_mask[:, 1:]
        policy, reference = (self.totals(x, completion) for x in (columns.logprobs, columns.ref_logprobs))
        scores, logprobs = self.scores(policy - reference), policy.chunk(2)
        nll = -columns.logprobs.chunk(2)[0][completion.chunk(2)[0]].mean()
        ref_chosen, ref_rejected = reference.chunk(2)
        return Pairs(
            ratios=(policy - reference).chunk(2),
            scores=scores.chunk(2),
            averages=(scores / columns.completion_mask.sum(1).clamp(min=1)).chunk(2),
            logprobs=logprobs,
            margins=(logprobs[0] - logprobs[1], ref_chosen - ref_rejected),
            chosen_nll=nll.expand(len(ref_chosen)),
            weights=self.weights(columns, Layout(completion)),
        )

    def weights(self, columns: Columns, layout: Layout) -> Tensor:
        """Return the product of both sides of each pair."""
        if not self.use_weighting:
            return torch.ones(len(layout.lengths) // 2, dtype=columns.logprobs.dtype)
        flat = layout.flat(columns.logprobs), layout.flat(columns.collision_logprobs)
        return on_policy_weights(*flat, layout.mask, layout.lengths).view(2, -1).prod(0)

    def losses(self, pairs: Pairs) -> Tensor:
        """Return the weighted mixture, one value per pair."""
        terms = [
            share * DPO_LOSSES[name](self, pairs) * pairs.weights
            for name, share in zip(self.names, self.shares, strict=True)
        ]
        return torch.stack(terms).sum(0)


DPOTerm = Callable[[DPOSettings, Pairs], Tensor]


def of(field: str, loss: Callable[..., Tensor], *, smoothed: bool = False) -> DPOTerm:
    """Read a field of the pairs, with label smoothing where TRL has it."""
    return lambda settings, pairs: loss(
        *getattr(pairs, field), beta=settings.beta, **(settings.smoothing if smoothed else {})
    )


def exo_pair(settings: DPOSettings, pairs: Pairs) -> Tensor:
    """Return log-probabilities rounded like TRL's, which takes logarithms of the preference in float32.

    The last bit of a float32 logarithm depends on the vector instructions of the processor. The case's tolerance
    therefore grows by a unit in the last place of the larger logarithm, in any dtype of the case.
    """
    scores, epsilon = pairs.scores, torch.tensor(settings.smoothing["label_smoothing"])
    rounded, smoothing = torch.stack([torch.log1p(-epsilon), torch.log(epsilon)]), epsilon.item()
    last_place = torch.finfo(torch.float32).eps * rounded.abs().max().item()
    settings.arguments.rounding = last_place * max(1.0, settings.beta / 2)  # the gradient has a factor of beta / 2
    exact = scores[0].new_tensor([1.0 - smoothing, smoothing]).log()
    loss = preference_loss.exo_pair(*scores, beta=settings.beta, label_smoothing=smoothing)
    chosen = (settings.beta * (scores[0] - scores[1])).sigmoid()
    return loss + chosen * (exact - rounded)[0] + (1.0 - chosen) * (exact - rounded)[1]


def discopop(settings: DPOSettings, pairs: Pairs) -> Tensor:
    return preference_loss.discopop(*pairs.scores, beta=settings.beta, temperature=settings.tau)


DPO_LOSSES: dict[str, DPOTerm] = {
    "sigmoid": of("scores", preference_loss.dpo),  # without label smoothing, which TRL ignores here
    "hinge": of("scores", preference_loss.hinge),
    "ipo": of("averages", preference_loss.ipo),
    "sigmoid_norm": of("averages", preference_loss.dpo),
    "exo_pair": exo_pair,
    "nca_pair": of("ratios", preference_loss.nca_pair),
    "robust": of("scores", preference_loss.robust_dpo, smoothed=True),
    "bco_pair": of("ratios", partial(preference_loss.bco_pair, delta=0.0)),
    "sppo_hard": of("ratios", preference_loss.sppo_hard),
    "aot": of("margins", preference_loss.aot, smoothed=True),
    "aot_unpaired": of("ratios", preference_loss.aot_unpaired, smoothed=True),
    "apo_zero": of("ratios", preference_loss.apo_zero),
    "apo_down": of("ratios", preference_loss.apo_down),
    "discopop": discopop,
    "sft": lambda settings, pairs: pairs.chosen_nll,
}


def pair_metrics(ratios: tuple[Tensor, ...], logprobs: tuple[Tensor, ...], *, beta: float) -> dict[str, Tensor]:
    """Return TRL's metrics of the implicit rewards, and of the sequences' log-probabilities."""
    chosen, rejected = (beta * side.detach() for side in ratios)
    return {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (chosen > rejected).float().mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "logps/chosen": logprobs[0].mean(),
        "logps/rejected": logprobs[1].mean(),
    }


def token_metrics(entropies: Tensor, mean_logits: Tensor, top1: Tensor, mask: Tensor, sides: int) -> dict[str, Tensor]:
    """Return TRL's metrics of the completions' tokens."""
    (chosen, rejected, *_), logits = mask.chunk(sides), mean_logits.chunk(sides)
    return {
        "entropy": masked_mean(entropies, mask),
        "logits/chosen": masked_mean(logits[0], chosen),
        "logits/rejected": masked_mean(logits[1], rejected),
        "mean_token_accuracy": masked_mean(top1.chunk(sides)[0].float(), chosen),
    }


def trl_dpo(arguments: Arguments) -> Outputs:
    """Return the loss from given columns of log-probabilities, or through the tiny model."""
    if arguments.has("input_ids"):
        return trl_dpo_tiny(arguments)
    settings, logprobs = DPOSettings(arguments), arguments.variable("policy_per_token_logps")
    # sums and lengths of the columns above
    arguments.ignore(*(f"{kind}_{row}" for row in ("logps", "lengths") for kind in ("chosen", "rejected")))
    arguments.ignore("ref_chosen_logps", "ref_rejected_logps")
    collisions = arguments.maybe("policy_log_sum_sq_probs")
    columns = Columns(
        logprobs=logprobs,
        ref_logprobs=arguments.tensor("ref_per_token_logps"),
        completion_mask=arguments.mask("completion_mask"),
        collision_logprobs=logprobs if collisions is None else collisions,  # not read without weights
    )
    pairs = settings.pairs(columns)
    loss = settings.losses(pairs).mean()
    alone = [settings.losses(settings.pairs(columns.pair(i))) for i in range(len(logprobs) // 2)]
    return {
        "loss": loss,
        "grad_policy_per_token_logps": gradient(loss, logprobs),
        "per_pair_loss": torch.cat(alone),
        **pair_metrics(pairs.ratios, pairs.logprobs, beta=settings.beta),
    }


def trl_dpo_tiny(arguments: Arguments) -> Outputs:
    """Return the loss from token ids."""
    settings, ids = DPOSettings(arguments), arguments.integers("input_ids")
    attended, completion = arguments.mask("attention_mask"), arguments.mask("completion_mask")
    model, reference = load(arguments, "policy_state_dict"), load(arguments, "ref_state_dict")
    logprobs, entropies, top1 = (column[:, 1:] for column in token_columns(model, ids, attended))
    with torch.no_grad():
        ref_logprobs = token_columns(reference, ids, attended)[0][:, 1:]
    mask = completion[:, 1:]
    columns = Columns(
        logprobs=torch.where(mask, logprobs, 0.0),
        ref_logprobs=torch.where(mask, ref_logprobs, 0.0),
        completion_mask=completion,
        collision_logprobs=logprobs,
    )
    pairs, mean_logits = settings.pairs(columns), next_token_mean_logits(model, ids, attended)[:, 1:]
    return {
        **parameter_gradients(settings.losses(pairs).mean(), model),
        "num_tokens": float(attended.sum()),
        **token_metrics(entropies, mean_logits, top1, mask, 2),
        **pair_metrics(pairs.ratios, pairs.logprobs, beta=settings.beta),
    }


@torch.no_grad()
def next_token_mean_logits(model: torch.nn.Module, ids: Tensor, attended: Tensor) -> Tensor:
    """Return [B, L] means of the logits behind each token; zero for the first token and for padding."""
    columns = torch.zeros(ids.shape, dtype=next(model.parameters()).dtype)
    for row, (tokens, kept) in enumerate(zip(ids, attended, strict=True)):
        places = kept.nonzero().flatten()
        columns[row, places[1:]] = model(input_ids=tokens[places][None]).logits[0, :-1].mean(-1)
    return columns


def trl_cpo(arguments: Arguments) -> Outputs:
    """CPO, SimPO and, with alpha, AlphaPO. Averages or sums come in; total_loss adds the supervised term."""
    chosen, rejected = arguments.variable("chosen_logps"), arguments.variable("rejected_logps")
    beta, alpha = arguments.number("beta", 0.1), arguments.number("alpha", 0.0)
    scores = [divergences.alphapo_scores(logprobs, alpha=alpha) for logprobs in (chosen, rejected)]
    losses = contrastive(arguments, *scores, beta=beta, gamma=arguments.number("simpo_gamma", 0.5))
    loss = losses.mean()
    return {
        "losses": losses,
        "chosen_rewards": beta * scores[0],
        "rejected_rewards": beta * scores[1],
        "total_loss": loss + arguments.number("cpo_alpha", 1.0) * arguments.tensor("nll_loss"),
        "grad_chosen": gradient(loss, chosen),
        "grad_rejected": gradient(loss, rejected),
    }


def contrastive(arguments: Arguments, chosen: Tensor, rejected: Tensor, *, beta: float, gamma: float) -> Tensor:
    """Return the reference-free losses common to CPO and TPO."""
    smoothing = {"label_smoothing": arguments.number("label_smoothing", 0.0)}
    losses = {
        "sigmoid": partial(preference_loss.dpo, **smoothing),
        "hinge": preference_loss.hinge,
        "ipo": preference_loss.ipo,
        "simpo": partial(preference_loss.simpo, gamma=gamma, **smoothing),
        "tpo-l": partial(preference_loss.simpo, gamma=gamma, **smoothing),
    }
    return losses[arguments.param("loss_type", "sigmoid")](chosen, rejected, beta=beta)


def trl_orpo(arguments: Arguments) -> Outputs:
    """TRL's losses are beta * log sigmoid, to be subtracted."""
    chosen, rejected = arguments.variable("chosen_avg_logps"), arguments.variable("rejected_avg_logps")
    beta, terms = arguments.number("beta", 0.1), preference_loss.odds_ratio(chosen, rejected)
    loss = (beta * terms).mean()
    return {
        "losses": -beta * terms,
        "chosen_rewards": beta * chosen,
        "rejected_rewards": beta * rejected,
        "log_odds_ratio_mean": -terms.mean(),
        "log_odds_chosen_mean": (preference_loss.log_odds(chosen) - preference_loss.log_odds(rejected)).mean(),
        "total_loss": arguments.tensor("nll_loss") + loss,
        "grad_chosen": gradient(loss, chosen),
        "grad_rejected": gradient(loss, rejected),
    }


def trl_tpo(arguments: Arguments) -> Outputs:
    """Rows are chosen, rejected and, unless tpo_alpha is 0, gold responses."""
    variable, ids = arguments.variable("logits"), arguments.integers("input_ids")
    mask, beta = arguments.mask("completion_mask")[:, 1:], arguments.number("beta", 0.01)
    alpha, gamma = arguments.number("tpo_alpha", 1.0), arguments.number("tpo_l_gamma", 0.5)
    sides, logits, targets = 3 if alpha else 2, variable[:, :-1], ids[:, 1:]
    layout, columns = Layout(mask), logprobs_from_logits(logits, targets)
    flat = (torch.where(layout.mask, layout.flat(columns), 0.0), layout.mask, layout.lengths)
    averages = arguments.param("loss_type", "sigmoid") in ("ipo", "tpo-l")
    pair = (sequence_means(*flat) if averages else sequence_sums(flat[0], layout.lengths)).chunk(sides)[:2]
    loss = contrastive(arguments, *pair, beta=beta, gamma=gamma).mean()
    if alpha:
        gold = mask.chunk(sides)[2]
        loss = loss + alpha * masked_mean(negative_logprob(columns.chunk(sides)[2], gold), gold)
    top1 = is_top1_from_logits(logits, targets)
    return {
        "loss": loss,
        "grad_logits": gradient(loss, variable),
        "num_tokens": float(ids.numel()),
        **token_metrics(entropy_from_logits(logits), logits.detach().mean(-1), top1, mask, sides),
        **pair_metrics(pair, pair, beta=beta),
    }


def openrlhf_dpo(arguments: Arguments) -> Outputs:
    """cDPO, or IPO of summed log-ratios."""
    chosen, rejected = arguments.variable("chosen_logps"), arguments.variable("rejected_logps")
    ratios = chosen - arguments.tensor("ref_chosen_logps"), rejected - arguments.tensor("ref_rejected_logps")
    beta, smoothing = arguments.number("beta"), arguments.number("label_smoothing", 0.0)
    cdpo = partial(preference_loss.dpo, label_smoothing=smoothing)
    losses = (preference_loss.ipo if arguments.param("ipo", False) else cdpo)(*ratios, beta=beta)
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

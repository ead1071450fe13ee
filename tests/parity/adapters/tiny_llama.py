"""From token ids to a loss and gradients, through a tiny Llama with weights in a separate case."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.objectives.logprobs import chunked_logprobs
from rlhf.objectives.supervised import negative_logprob
from tests.parity.adapters.aggregation import weighted
from tests.parity.adapters.grpo_losses import compute_loss, trl_grpo_loss
from tests.parity.adapters.logprobs import IGNORED
from tests.parity.case import Adapter, Arguments, Outputs, as_tensor
from tests.parity.layout import Layout
from tests.plain_logits import dynamic_fine_tuning, is_top1_from_logits, masked_mean

WEIGHTS_CASE = "trl.e2e.weights"


def load(arguments: Arguments, weights: str) -> LlamaForCausalLM:
    """The policy or the reference."""
    case = arguments.others[arguments.param("weights_case", WEIGHTS_CASE)]
    sizes = {name: value for name, value in case.params.items() if name != "rope"}  # the default one
    config = LlamaConfig(**sizes, attention_dropout=0.0, attn_implementation="eager")
    model = LlamaForCausalLM(config).to(arguments.dtype).eval()
    model.load_state_dict({name: as_tensor(values, arguments.dtype) for name, values in case.inputs[weights].items()})
    return model


def token_columns(model: LlamaForCausalLM, ids: Tensor, attended: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return [B, L] (logprobs, entropy, is_top1) of each token given the earlier tokens, else zero.

    Each row runs alone, without padding.
    """
    logprobs, entropies = (torch.zeros(ids.shape, dtype=model.dtype) for _ in range(2))
    top1 = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (tokens, kept) in enumerate(zip(ids, attended, strict=True)):
        places = kept.nonzero().flatten()
        hidden = model.model(input_ids=tokens[places][None]).last_hidden_state[0, :-1]
        targets = tokens[places][1:]
        found = chunked_logprobs(hidden, model.lm_head.weight, targets, entropy_grad=True, chunk_size=4)
        here = (torch.tensor(row), places[1:])
        logprobs, entropies = logprobs.index_put(here, found[0]), entropies.index_put(here, found[1])
        top1[here] = is_top1_from_logits(model.lm_head(hidden), targets)
    return logprobs, entropies, top1


def parameter_gradients(loss: Tensor, model: LlamaForCausalLM) -> dict[str, Tensor]:
    """The loss, the norm of the gradient over all parameters, and the head's gradient."""
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.cat(gradients).norm()
    return {"loss": loss, "grad_norm_all_params": norm, "grad_lm_head": model.lm_head.weight.grad}


def trl_logps(arguments: Arguments) -> Outputs:
    """The last tokens' log-probabilities and entropies."""
    ids, attended = arguments.integers("input_ids"), arguments.mask("attention_mask")
    last = int(arguments.number("logits_to_keep"))
    policy = token_columns(load(arguments, "policy_state_dict"), ids, attended)
    reference = token_columns(load(arguments, "ref_state_dict"), ids, attended)
    names = {"policy_logps": policy[0], "policy_entropies": policy[1], "ref_logps": reference[0]}
    return {name: columns[:, -last:] for name, columns in names.items()}


def trl_grpo(arguments: Arguments) -> Outputs:
    """GRPO's loss of the tokens after the prompt, or from given log-probabilities."""
    if not arguments.has("input_ids"):
        return trl_grpo_loss(arguments)
    ids, attended = arguments.integers("input_ids"), arguments.mask("attention_mask")
    start = int(arguments.integers("prompt_len"))
    model = load(arguments, "policy_state_dict")
    logprobs, entropies, _ = (columns[:, start:] for columns in token_columns(model, ids, attended))
    layout = Layout(attended[:, start:])
    loss, metrics = compute_loss(arguments, layout, layout.flat(logprobs), layout.flat(entropies))
    return {**parameter_gradients(loss, model), **metrics}


def trl_sft(arguments: Arguments) -> Outputs:
    """Return cross-entropy or DFT of the labels that are not ignored."""
    ids, attended = arguments.integers("input_ids"), arguments.mask("attention_mask")
    learnt = (arguments.integers("labels") != IGNORED) & attended
    learnt[:, 0] = False
    objective = {"nll": negative_logprob, "dft": dynamic_fine_tuning}[arguments.param("loss_type", "nll")]
    model, layout = load(arguments, "policy_state_dict"), Layout(learnt)
    logprobs, entropies, top1 = token_columns(model, ids, attended)
    losses = objective(layout.flat(logprobs), layout.mask)
    loss = weighted(losses, layout, "token_mean", num_tokens=float(layout.mask.sum()))
    return {
        **parameter_gradients(loss, model),
        "entropy": masked_mean(entropies, learnt),
        "mean_token_accuracy": masked_mean(top1.float(), learnt),
        "num_tokens": float(attended.sum()),
    }


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("trl", "GRPOTrainer._compute_loss"): trl_grpo,
    ("trl", "GRPOTrainer._get_per_token_logps_and_entropies"): trl_logps,
    ("trl", "SFTTrainer.compute_loss"): trl_sft,
}

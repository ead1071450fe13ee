"""From token ids to a loss and gradients, through a tiny Llama with weights in a separate case."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.objectives.logprobs import chunked_logprobs
from rlhf.objectives.masking import masked_mean
from rlhf.objectives.supervised import negative_logprob
from tests.parity.adapters.aggregation import weighted
from tests.parity.adapters.grpo_losses import compute_loss, trl_grpo_loss
from tests.parity.adapters.logprobs import IGNORED
from tests.parity.case import Adapter, Arguments, Case, Outputs, Unsupported, as_tensor
from tests.parity.layout import Layout
from tests.plain_logits import dynamic_fine_tuning, is_top1_from_logits

WEIGHTS_CASE = "trl.e2e.weights"
KNOWN = {
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope",
}
DEFAULT_ROPE = "{'rope_theta': 10000.0, 'rope_type': 'default'}"


def load(arguments: Arguments, weights: str) -> LlamaForCausalLM:
    """The policy or the reference."""
    case = arguments.other(arguments.param("weights_case", WEIGHTS_CASE))
    sizes = dict(case.params)
    if not sizes.keys() <= KNOWN or sizes.pop("rope", DEFAULT_ROPE) != DEFAULT_ROPE:
        raise Unsupported(f"a Llama with {sorted(sizes)}")
    config = LlamaConfig(**sizes, attention_dropout=0.0, attn_implementation="eager")
    model = LlamaForCausalLM(config).to(arguments.dtype).eval()
    model.load_state_dict(state_dict(case, weights, arguments.dtype))
    return model


def state_dict(case: Case, weights: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return named tensors of a model of the weights case."""
    stored: dict[str, Any] | None = case.inputs.get(weights)
    if stored is None:
        raise Unsupported(f"no {weights} in {case.name}")
    return {name: as_tensor(values, dtype) for name, values in stored.items()}


def token_columns(model: LlamaForCausalLM, ids: Tensor, attended: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return [B, L] (logprobs, entropy, is_top1) of each token given the earlier tokens; zero for the first and for
    padding.

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
    """The norm over all parameters, and the head's gradient."""
    loss.backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    head = model.lm_head.weight.grad
    if head is None:
        raise Unsupported("a loss that does not depend on the head")
    return {"grad_norm_all_params": torch.cat(gradients).norm(), "grad_lm_head": head}


def trl_logps(arguments: Arguments) -> Outputs:
    """The last tokens' log-probabilities and entropies."""
    ids, attended = arguments.integers("input_ids"), arguments.mask("attention_mask")
    last = arguments.whole("logits_to_keep")
    policy = token_columns(load(arguments, "policy_state_dict"), ids, attended)
    reference = token_columns(load(arguments, "ref_state_dict"), ids, attended)
    names = {"policy_logps": policy[0], "policy_entropies": policy[1], "ref_logps": reference[0]}
    return {name: columns[:, -last:] for name, columns in names.items()}


def trl_grpo(arguments: Arguments) -> Outputs:
    """GRPO's loss of the tokens after the prompt."""
    ids, attended = arguments.integers("input_ids"), arguments.mask("attention_mask")
    start = int(arguments.integers("prompt_len"))
    model = load(arguments, "policy_state_dict")
    logprobs, entropies, _ = (columns[:, start:] for columns in token_columns(model, ids, attended))
    layout = Layout(attended[:, start:])
    loss, metrics = compute_loss(arguments, layout, layout.flat(logprobs), layout.flat(entropies))
    return {"loss": loss, **parameter_gradients(loss, model), **metrics}


def trl_sft(arguments: Arguments) -> Outputs:
    """Return cross-entropy or DFT of the labels that are not ignored."""
    ids, attended = arguments.integers("input_ids"), arguments.mask("attention_mask")
    labels = arguments.integers("labels")
    learnt = (labels != IGNORED) & attended
    learnt[:, 0] = False
    if not torch.equal(labels[learnt], ids[learnt]):
        raise Unsupported("labels that are not the tokens")
    if bool((learnt[:, 1:] & ~attended[:, :-1]).any()):
        raise Unsupported("a label after a token that is not attended to")
    objective = arguments.choice("loss_type", {"nll": negative_logprob, "dft": dynamic_fine_tuning}, "nll")
    model = load(arguments, "policy_state_dict")
    logprobs, entropies, top1 = token_columns(model, ids, attended)
    layout = Layout(learnt)
    num_tokens = arguments.number("num_items_in_batch", float(layout.mask.sum())) or 1.0
    losses = objective(layout.flat(logprobs), layout.mask)
    loss = weighted(losses, layout, "token_mean", num_tokens=num_tokens, num_sequences=1)
    return {
        "loss": loss,
        **parameter_gradients(loss, model),
        "entropy": masked_mean(entropies, learnt),
        "mean_token_accuracy": masked_mean(top1.float(), learnt),
        "num_tokens": float(attended.sum()),
    }


def grpo_or_tiny(arguments: Arguments) -> Outputs:
    """The same function of TRL, with a model in place of given log-probabilities."""
    return trl_grpo(arguments) if arguments.has("input_ids") else trl_grpo_loss(arguments)


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("trl", "GRPOTrainer._compute_loss"): grpo_or_tiny,
    ("trl", "GRPOTrainer._get_per_token_logps_and_entropies"): trl_logps,
    ("trl", "SFTTrainer.compute_loss"): trl_sft,
}

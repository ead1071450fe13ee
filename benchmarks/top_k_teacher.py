"""What a teacher's k likeliest tokens cost and lose: bytes, and loss and gradient beside the whole vocabulary.

    python benchmarks/top_k_teacher.py --teacher runs/two-teachers-smollm2/gcd/final

The student answers prompts of two tasks. The loss is the mean divergence over the sampled tokens. The error of the
gradient is relative, for the gradient with respect to the student's last hidden states.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.algorithms.distillation import divergence_of
from rlhf.data.tasks import TaskSource, make_rows
from rlhf.objectives.distillation import Teacher, TeacherStates, sampled_divergence_sum, top_logprobs

SIZES = (8, 64, 512)
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def answers(model: Any, tokenizer: Any, prompts: int, new_tokens: int) -> list[tuple[Tensor, int]]:
    """Return prompts with sampled responses as token ids, and the length of each prompt."""
    rows: list[dict[str, Any]] = []
    for task in ("reasoning_gym/gcd", "reasoning_gym/lcm"):
        source = TaskSource(task=task, split="train", size=prompts // 2, args={"max_value": 20})
        rows += make_rows(source)
    sampled = []
    torch.manual_seed(0)
    for row in rows:
        messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
        how = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        ids = tokenizer.apply_chat_template(messages, **how)["input_ids"]
        out = model.generate(ids, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=new_tokens)
        sampled.append((out[0], ids.shape[1]))
    return sampled


def states(model: Any, sampled: list[tuple[Tensor, int]]) -> Tensor:
    """Return the last hidden states that predict the sampled tokens, in float32."""
    with torch.no_grad():
        of_rows = [model.model(ids[None]).last_hidden_state[0, start - 1 : -1] for ids, start in sampled]
    return torch.cat(of_rows).float()


def loss_and_gradient(
    divergence: str, hidden: Tensor, weight: Tensor, tokens: Tensor, teacher: Teacher
) -> tuple[float, Tensor]:
    hidden = hidden.clone().requires_grad_()
    of = divergence_of(divergence, beta=0.5)
    loss = sampled_divergence_sum(of, hidden, weight, tokens, teacher, token_weight=1.0 / len(tokens))[0]
    (gradient,) = torch.autograd.grad(loss, hidden)
    return loss.item(), gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--teacher", required=True, help="a model folder with the student's tokenizer")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()
    load = partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float32)
    student, teacher = load(args.student).eval(), load(args.teacher).eval()
    sampled = answers(student, AutoTokenizer.from_pretrained(args.student), args.prompts, args.new_tokens)
    tokens = torch.cat([ids[start:] for ids, start in sampled])
    ours, theirs = states(student, sampled), states(teacher, sampled)
    weight, head = student.lm_head.weight.detach(), teacher.lm_head.weight.detach()
    whole = TeacherStates(hidden=theirs, weight=head)
    tops = {k: top_logprobs(theirs, head, tokens, k=k, temperature=1.0) for k in (*SIZES, len(head))}
    out = [f"{len(tokens)} sampled tokens\n\n| k | bytes / token | mass outside |"]
    out += [f" {name} | error of the gradient |" for name in DIVERGENCES]
    out += ["\n|---|---|---|", "---|---|" * len(DIVERGENCES), "\n"]
    exact = {name: loss_and_gradient(name, ours, weight, tokens, whole) for name in DIVERGENCES}
    out += [f"| states | {2 * theirs.shape[1]} | 0 |", *(f" {exact[name][0]:.4f} | |" for name in DIVERGENCES), "\n"]
    for k, top in tops.items():
        outside = 1.0 - top.logprobs.double().exp().sum(-1).mean().item()
        out.append(f"| {k} | {8 * k + 4} | {max(outside, 0.0):.1e} |")
        for name in DIVERGENCES:
            loss, gradient = loss_and_gradient(name, ours, weight, tokens, top)
            whole_loss, whole_gradient = exact[name]
            error = ((gradient - whole_gradient).norm() / whole_gradient.norm()).item()
            out.append(f" {loss:.4f} ({loss / whole_loss - 1.0:+.2%}) | {error:.1%} |")
        out.append("\n")
    sys.stdout.write("".join(out))


if __name__ == "__main__":
    main()

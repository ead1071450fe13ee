"""GRPO as a loop of your own: the numbers of `rlhf train examples/loops/letters.yaml`, bit for bit in float32."""

import asyncio
import sys

import torch

import rlhf
from rlhf.algorithms.microbatch import PolicyMicrobatch, Surrogate
from rlhf.controller.own_loop import OwnLoop


def clipped(batch: PolicyMicrobatch) -> Surrogate:
    """Return PPO's clipped loss of each token. The ranks run this function."""
    mask, advantages = batch.response_mask, batch.advantages
    ratio = torch.where(mask, batch.logprobs - batch.old_logprobs, 0.0).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    too_low, too_high = (ratio < 0.8) & (advantages < 0), (ratio > 1.2) & (advantages > 0)
    return Surrogate(per_token=torch.where(mask, loss, 0.0), ratio=ratio.detach(), clipped=mask & (too_low | too_high))


async def grpo(loop: OwnLoop) -> None:
    """Train for the configured number of steps."""
    while loop.step < loop.num_steps:
        async with loop.next_step():
            groups = await loop.sample()
            scores = torch.tensor([group.scores.scores for group in groups], dtype=torch.float64)
            centred = scores - scores.mean(dim=1, keepdim=True)
            advantages = centred / (scores.std(dim=1, keepdim=True) + 1e-6)
            batch = await loop.experience(groups, advantages.tolist())
            for minibatch in loop.visits(batch):
                await loop.forward_backward(minibatch, loss=clipped)
                await loop.optim_step()
            await loop.sync()


async def main() -> None:
    async with rlhf.start("examples/loops/letters.yaml", sys.argv[1:]) as loop:
        await grpo(loop)
        await loop.export()


if __name__ == "__main__":
    asyncio.run(main())

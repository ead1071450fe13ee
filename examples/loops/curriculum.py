"""A curriculum that looks at gradients: the kinds of prompts with the larger gradients get more prompts.

Each kind has its own optimizer step, whose gradient norm decides how many prompts of the kind the next step samples. No
configuration says this: `python examples/loops/curriculum.py`.
"""

import asyncio
import random
import sys
from collections.abc import Mapping

import rlhf
from rlhf.controller.own_loop import OwnLoop

WANTED = {"digits": "0123456789", "vowels": "aeiou", "x": "x"}
PROMPTS = 12  # of each step


def shares(norms: Mapping[str, float]) -> dict[str, int]:
    """Return the number of prompts of each kind, at least one, in proportion to the norms."""
    left, total = PROMPTS - len(norms), sum(norms.values())
    counts = {kind: 1 + int(left * norm / total) for kind, norm in norms.items()}
    counts[max(norms, key=norms.__getitem__)] += PROMPTS - sum(counts.values())
    return counts


async def curriculum(loop: OwnLoop) -> list[dict[str, int]]:
    """Train for the configured number of steps. Return the number of prompts of each kind in each step."""
    norms, history = dict.fromkeys(WANTED, 1.0), []
    while loop.step < loop.num_steps:
        async with loop.next_step() as step:
            counts, draw = shares(norms), random.Random(step)
            groups = await loop.sample(
                [
                    loop.prompt(f"{draw.randint(1, 8)} {kind}:", wanted=WANTED[kind], kind=kind)
                    for kind, count in counts.items()
                    for _ in range(count)
                ]
            )
            for kind in WANTED:
                await loop.experience([one for one in groups if one.prompt.columns["kind"] == kind])
                await loop.forward_backward()
                norm = (await loop.optim_step())["update/grad_norm"]
                norms[kind] = 0.7 * norms[kind] + 0.3 * norm
            loop.record(**{f"prompts_{kind}": count for kind, count in counts.items()})
            await loop.sync()
        history.append(counts)
    return history


async def main() -> None:
    config = {
        "base": "examples/loops/letters.yaml",
        "run": {"name": "curriculum"},
        "train": {"sequences_per_update": 96},  # one minibatch
    }
    async with rlhf.start(config, sys.argv[1:]) as loop:
        for step, counts in enumerate(await curriculum(loop), start=1):
            sys.stdout.write(f"step {step}: {counts}\n")
        await loop.export()


if __name__ == "__main__":
    asyncio.run(main())

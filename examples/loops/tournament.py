"""A tournament between two policies on one base model: a win against the other policy is the only reward.

`rlhf models fetch smollm2`, then the server, `rlhf tinker examples/loops/server.yaml`, and at the same time
`python examples/loops/tournament.py`.
"""

import asyncio
import sys
from collections.abc import Sequence

from tinker import RestClient, ServiceClient, TrainingClient
from tinker.types import AdamParams, Datum, ModelInput, SampledSequence, SamplingParams

RATES = {"slow": 1e-4, "fast": 4e-4}  # the learning rates play against each other
PROMPTS = ("My telephone number is", "The numbers of the lottery are", "Pi is about", "The year was")
SAMPLES, TOKENS, KEY = 16, 8, "tml-tournament"
Game = tuple[list[int], SampledSequence]


def in_tokens(player: TrainingClient) -> tuple[list[list[int]], frozenset[int]]:
    """Return the prompts and the digits in tokens."""
    tokenizer = player.get_tokenizer()
    return [tokenizer.encode(text) for text in PROMPTS], frozenset(tokenizer.encode(one)[-1] for one in "0123456789")


async def answers(player: TrainingClient, seed: int, prompts: Sequence[list[int]]) -> list[Game]:
    sampler, asked = await player.save_weights_and_get_sampling_client(), []
    for place, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=TOKENS, seed=seed + place * SAMPLES)
        asked.append(sampler.sample(ModelInput.from_ints(prompt), SAMPLES, params))
    said = await asyncio.gather(*asked)
    return [(prompt, one) for prompt, of_prompt in zip(prompts, said, strict=True) for one in of_prompt.sequences]


async def learn(player: TrainingClient, games: Sequence[Game], rewards: Sequence[float], rate: float) -> None:
    rows = []
    for (prompt, answer), reward in zip(games, rewards, strict=True):
        tokens, before = [*prompt, *answer.tokens], [0.0] * (len(prompt) - 1)
        advantages = [*before, *[reward] * len(answer.tokens)]
        columns = {"target_tokens": tokens[1:], "logprobs": [*before, *answer.logprobs], "advantages": advantages}
        rows.append(Datum(model_input=ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=columns))
    gradient = player.forward_backward(rows, "importance_sampling")
    await asyncio.gather(gradient, player.optim_step(AdamParams(learning_rate=rate)))


async def main(url: str, rounds: int) -> None:
    client = ServiceClient(base_url=url, api_key=KEY)
    (model, *_) = (await RestClient(base_url=url, api_key=KEY).get_server_capabilities()).supported_models
    players = [await client.create_lora_training_client(model.model_name, rank=8) for _ in RATES]
    prompts, digits = in_tokens(players[0])
    for number in range(1, rounds + 1):
        seeds = (2000 * number, 2000 * number + 1000)  # with equal seeds, equal policies would tie forever
        both = await asyncio.gather(*[answers(*of, prompts) for of in zip(players, seeds, strict=True)])
        points = [[sum(token in digits for token in answer.tokens) for _, answer in games] for games in both]
        ahead = [float(slow > fast) - float(slow < fast) for slow, fast in zip(*points, strict=True)]
        rewards = [ahead, [-one for one in ahead]]
        await asyncio.gather(*map(learn, players, both, rewards, RATES.values()))
        for name, won, counts in zip(RATES, rewards, points, strict=True):
            wins, share = won.count(1.0) / len(won), sum(counts) / (len(counts) * TOKENS)
            sys.stdout.write(f"round {number}: {name} won {wins:.2f}, share of digits {share:.2f}\n")
    client.close("success").result()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if sys.argv[1:] else "http://127.0.0.1:8703", rounds=20))

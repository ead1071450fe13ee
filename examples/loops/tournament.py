"""A tournament between two policies on one base model: a win against the other policy is the only reward.

Start the server, then the tournament: `rlhf tinker examples/loops/server.yaml`, `python examples/loops/tournament.py`.
"""

import asyncio
import sys
from collections.abc import Sequence

from tinker import RestClient, ServiceClient, TrainingClient
from tinker.types import AdamParams, Datum, ModelInput, SampledSequence, SamplingParams

RATES = {"slow": 1e-3, "fast": 4e-3}  # the learning rates play against each other
PROMPTS = [list(text.encode()) for text in ("1 digits:", "2 digits:", "3 digits:", "4 digits:")]
DIGITS = frozenset(b"0123456789")
SAMPLES, TOKENS, KEY = 16, 8, "tml-tournament"
Game = tuple[list[int], SampledSequence]


def points(game: Game) -> int:
    """Return the number of digits of an answer. The tokens of the tiny model are bytes."""
    return sum(token in DIGITS for token in game[1].tokens)


async def answers(player: TrainingClient, seed: int) -> list[Game]:
    sampler = await player.save_weights_and_get_sampling_client()
    params = SamplingParams(max_tokens=TOKENS, seed=seed)
    said = await asyncio.gather(*[sampler.sample(ModelInput.from_ints(one), SAMPLES, params) for one in PROMPTS])
    return [(prompt, one) for prompt, of_prompt in zip(PROMPTS, said, strict=True) for one in of_prompt.sequences]


async def learn(player: TrainingClient, games: Sequence[Game], rewards: Sequence[float], rate: float) -> None:
    rows = []
    for (prompt, answer), reward in zip(games, rewards, strict=True):
        tokens, before = [*prompt, *answer.tokens], [0.0] * (len(prompt) - 1)
        advantages = [*before, *[reward] * len(answer.tokens)]
        columns = {"target_tokens": tokens[1:], "logprobs": [*before, *answer.logprobs], "advantages": advantages}
        rows.append(Datum(model_input=ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=columns))
    gradient, step = (
        player.forward_backward(rows, "importance_sampling"),
        player.optim_step(AdamParams(learning_rate=rate)),
    )
    await asyncio.gather(gradient, step)


async def main(url: str, rounds: int) -> None:
    client = ServiceClient(base_url=url, api_key=KEY)
    (model, *_) = (await RestClient(base_url=url, api_key=KEY).get_server_capabilities()).supported_models
    players = [await client.create_lora_training_client(model.model_name, rank=8) for _ in RATES]
    for number in range(1, rounds + 1):
        seeds = (2 * number, 2 * number + 1)  # with equal seeds, equal policies would tie forever
        both = await asyncio.gather(*map(answers, players, seeds))
        pairs = list(zip(*[map(points, games) for games in both], strict=True))
        ahead = [float(slow > fast) - float(slow < fast) for slow, fast in pairs]
        rewards = [ahead, [-one for one in ahead]]
        await asyncio.gather(*map(learn, players, both, rewards, RATES.values()))
        won = [of_player.count(1.0) / len(pairs) for of_player in rewards]
        digits = [sum(of_player) / (len(pairs) * TOKENS) for of_player in zip(*pairs, strict=True)]
        for name, *numbers in zip(RATES, won, digits, strict=True):
            sys.stdout.write(f"round {number}: {name} won {numbers[0]:.2f}, share of digits {numbers[1]:.2f}\n")
    client.close("success").result()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if sys.argv[1:] else "http://127.0.0.1:8703", rounds=30))

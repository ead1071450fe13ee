"""An agent asks the model for a number, and answers whether the secret is higher or lower."""

import re

TURNS = 3


async def solve(task, client):
    """Search for the secret number in at most three turns."""
    messages = list(task["messages"])
    secret = task["secret"]
    for turn in range(1, TURNS + 1):
        answer = await client.openai.chat.completions.create(model=client.model, messages=messages)
        said = answer.choices[0].message.content or ""
        numbers = re.findall(r"\d+", said)
        guess = int(numbers[-1][:9]) if numbers else 0
        if guess == secret:
            return {"found": True, "turns": turn}
        messages.append({"role": "assistant", "content": said})
        messages.append({"role": "user", "content": "higher" if guess < secret else "lower"})
    return {"found": False, "turns": TURNS}


def found(prompt, response, result):
    """The reward: 1 if the agent found the number."""
    return float(result["found"])

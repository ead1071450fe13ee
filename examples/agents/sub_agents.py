"""An agent with sub-agents: each question gets a separate conversation, and a last call joins the answers."""

import asyncio


async def ask(client, text):
    """Hold a conversation of one turn."""
    messages = [{"role": "user", "content": text}]
    answer = await client.openai.chat.completions.create(model=client.model, messages=messages)
    return answer.choices[0].message.content or ""


async def solve(task, client):
    """Ask all sub-agents at the same time, then join the answers."""
    parts = task["prompt"].split(";")
    answers = await asyncio.gather(*[ask(client, part) for part in parts])
    return await ask(client, "join: " + "; ".join(answers))

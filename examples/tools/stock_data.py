"""Write the data of stock.yaml beside it: conversations to imitate, prompts, and held-out prompts.

A third of the conversations look an item up, a third guess, and a third repeat a number. The numbers are random, so
no stock can be learned by heart from these conversations.
"""

import asyncio
import json
import random
from pathlib import Path

from stock_server import STOCK, server

LISTED = asyncio.run(server.list_tools())
TOOLS = [
    {"type": "function", "function": {"name": t.name, "description": t.description, "parameters": t.input_schema}}
    for t in LISTED
]
draw = random.Random(0)


def question(item):
    return {"role": "user", "content": f"How many {item}?"}


def conversation(kind):
    item, number = draw.choice(list(STOCK)), str(draw.randint(1, 9))
    call = {"type": "function", "function": {"name": "count", "arguments": {"item": item}}}
    messages = {
        "look up": [question(item), {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": number}],
        "guess": [question(item)],
        "repeat": [{"role": "user", "content": number}],
    }[kind]
    row = {"messages": [*messages, {"role": "assistant", "content": number}]}
    return row if kind == "repeat" else row | {"tools": TOOLS}


prompts = [{"messages": [question(item)], "answer": str(number)} for item, number in STOCK.items()]
files = {
    "sft": [conversation(kind) for _ in range(800) for kind in ("look up", "guess", "repeat")],
    "train": prompts[:12],
    "eval": prompts[12:],
}
for name, rows in files.items():
    text = "".join(json.dumps(row) + "\n" for row in rows)
    Path(__file__).with_name(f"stock_{name}.jsonl").write_text(text, encoding="utf-8")

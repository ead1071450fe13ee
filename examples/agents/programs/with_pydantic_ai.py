"""An agent of Pydantic AI multiplies with a tool, and is asked a second time. Anthropic's Messages."""

import json
import sys

from pydantic_ai import Agent

agent = Agent("anthropic:model", instructions="Multiply with the tool.")


@agent.tool_plain
def multiply(a: int, b: int) -> int:
    """Multiply two numbers."""
    return a * b


first = agent.run_sync(json.load(sys.stdin)["prompt"])
print(agent.run_sync("Are you sure? Say the number alone.", message_history=first.all_messages()).output)

"""A ToolCallingAgent of smolagents multiplies with a tool. Chat Completions."""

import json
import sys

from smolagents import OpenAIModel, ToolCallingAgent, tool


@tool
def multiply(a: int, b: int) -> int:
    """Multiply two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a * b


model = OpenAIModel("model", tool_choice="auto")  # with smolagents' "required", a grammar would write the calls
agent = ToolCallingAgent(tools=[multiply], model=model, max_steps=2, verbosity_level=0)
print(agent.run(json.load(sys.stdin)["prompt"]))

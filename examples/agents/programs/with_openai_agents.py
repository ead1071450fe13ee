"""An agent of the OpenAI Agents SDK multiplies with a tool, and is asked a second time. Responses."""

import json
import sys

from agents import Agent, ModelBehaviorError, Runner, function_tool, set_tracing_disabled

set_tracing_disabled(True)


@function_tool
def multiply(a: int, b: int) -> int:
    """Multiply two numbers."""
    return a * b


agent = Agent(name="calculator", model="model", instructions="Multiply with the tool.", tools=[multiply])
try:
    first = Runner.run_sync(agent, json.load(sys.stdin)["prompt"])
    again = [*first.to_input_list(), {"role": "user", "content": "Are you sure? Say the number alone."}]
    print(Runner.run_sync(agent, again).final_output)
except ModelBehaviorError as error:  # the SDK raises it for a response that was cut at its limit of tokens
    print(f"no answer: {error}")

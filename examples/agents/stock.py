"""An agent has a tool of an MCP server: the model may look up the stock before the answer.

rollouts.agent.tools.mcp: [{command: [python, ../tools/stock_server.py]}]
"""

ROUNDS = 3


async def solve(task, client):
    """Call the tools that the model asks for, until it answers."""
    messages = [{"role": "user", "content": task["prompt"]}]
    for _ in range(ROUNDS):
        answer = await client.openai.chat.completions.create(
            model=client.model, messages=messages, tools=client.tools.openai
        )
        message = answer.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            return message.content or ""
        for call in message.tool_calls:
            result = await client.tools.call(call.function.name, call.function.arguments)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    return "no answer"

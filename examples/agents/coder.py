"""A coding agent: the model writes a file, reads the errors of tests in the sandbox, and tries again."""

import asyncio
import re
from pathlib import Path

from rlhf.rewards.functions.code_tests import CodeTests
from rlhf.rewards.sandbox.run import Sandbox

ATTEMPTS = 3
FILE = "solution.py"
SANDBOX = Sandbox()  # made once, when the agent is loaded
HIDDEN = CodeTests(extract="whole")


async def solve(task, client):
    """Write the file until the visible test passes. The session's folder `result` goes to the reward."""
    messages = [{"role": "user", "content": f"Write {FILE} in a Python block.\n{task['prompt']}"}]
    for _ in range(ATTEMPTS):
        answer = await client.openai.chat.completions.create(model=client.model, messages=messages)
        said = answer.choices[0].message.content or ""
        blocks = re.findall(r"```(?:python)?\n(.*?)```", said, flags=re.DOTALL)
        code = blocks[-1] if blocks else said
        Path("result", FILE).write_text(code)
        run = await asyncio.to_thread(SANDBOX.run, f"{code}\n{task['visible_test']}", wall_s=5.0)
        if run.code == 0:
            break
        error = run.stderr.decode(errors="replace")[-300:] or "the program took too long"
        messages.append({"role": "assistant", "content": said})
        messages.append({"role": "user", "content": f"The test failed:\n{error}"})


def passes(prompt, response, result, tests):
    """The reward: 1 if the file passes the hidden tests, which the agent never sees."""
    return HIDDEN(prompt, result[FILE], tests=tests)

"""Ask the suites, as a separate process: `python -m rlhf.suites.program FOLDER`. The folder has inputs and results.

The process ends with its parent. A line of standard output is progress, and everything else goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from rlhf.errors import RunError, UserError
from rlhf.suites.spec import Endpoint, SuiteAnswers, SuitePlan, SuiteSpec

INPUTS, PLAN, RESULTS, FAILURE = "inputs.json", "plan.json", "results.jsonl", "failure.json"
SAYS_EVERY_S = 1.0


def main(folder: Path) -> int:
    """Write plan.json without an endpoint, results.jsonl with an endpoint, or failure.json."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries and the programs that they start print
    threading.Thread(target=_end_with_parent, daemon=True).start()
    given = json.loads((folder / INPUTS).read_text())
    spec = TypeAdapter(SuiteSpec).validate_python(given["spec"])
    endpoint = None if given["endpoint"] is None else TypeAdapter(Endpoint).validate_python(given["endpoint"])
    said_at = 0.0

    def say(done: int, total: int) -> None:
        nonlocal said_at
        if done == total or time.monotonic() - said_at >= SAYS_EVERY_S:
            said_at = time.monotonic()
            lines.write(f"{done} {total}\n")

    try:
        results, longest = answers_of(spec, endpoint, say)
    except (UserError, RunError) as error:
        (folder / FAILURE).write_text(json.dumps([type(error).__name__, str(error)]))
        return 1
    except Exception as error:  # noqa: BLE001  the parent raises it, with the library's message
        traceback.print_exc()
        (folder / FAILURE).write_text(json.dumps(["RunError", f"{type(error).__name__}: {error}"]))
        return 1
    if endpoint is None:
        plan = SuitePlan(questions=sum(len(suite.questions) for suite in results), longest=longest)
        (folder / PLAN).write_text(json.dumps(asdict(plan)))
    else:
        (folder / RESULTS).write_text("".join(json.dumps(asdict(suite)) + "\n" for suite in results))
    return 0


def answers_of(spec: SuiteSpec, endpoint: Endpoint | None, say: Any) -> tuple[list[SuiteAnswers], int]:
    """Return the answers of each suite, and the tokens of the longest prompt with its response."""
    from rlhf.suites.client import Client
    from rlhf.suites.harness import ask_tasks, load_tasks
    from rlhf.suites.prompts import Prompts
    from rlhf.suites.reasoning import REASONING_SUITES, ask_reasoning

    theirs = [name for name in spec.names if name not in REASONING_SUITES]
    loaded = load_tasks(theirs, spec.data) if theirs else {}
    client, prompts = Client(endpoint, say), Prompts(spec)
    results = []
    for name in spec.names:
        if name in loaded:
            results.append(ask_tasks(name, loaded[name], spec, client, prompts))
        else:
            results.append(ask_reasoning(name, spec, client, prompts))
    if prompts.num_cut:
        sys.stderr.write(f"{prompts.num_cut} prompts are longer than the model takes, and lost their beginning\n")
    return results, client.longest


def _end_with_parent() -> None:
    os.read(0, 1)  # the parent's end of the pipe closes with the parent
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

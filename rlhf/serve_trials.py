"""Run trials of a sweep in turn in one process. Later trials reuse Ray, the imports and equal engines.

actors.sweeps.runner starts the process and writes a line of JSON a trial to stdin. The process answers with a line on
stdout after each successful trial; all remaining output goes to the trial's log. The process ends with stdin, or with
the exit code of the first failed trial, because the state after a failure is unknown.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack, suppress

from rlhf.cli import main
from rlhf.errors import RunError, UserError
from rlhf.process.stopping import leave_stuck_threads


def run_trials() -> int:
    """Run trials until the end of stdin."""
    with ExitStack() as to_the_end, os.fdopen(os.dup(1), "w") as replies:
        has_ray = False
        for line in sys.stdin:
            order = json.loads(line)
            sys.stdout.flush()
            with open(order["log"], "ab") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            if order["keep"] and not has_ray:
                has_ray = True
                with suppress(UserError, RunError):  # main raises the same error again, and reports it
                    _keep(to_the_end, order["words"][1])
            code = main(order["words"])
            if code != 0:
                return code
            replies.write("done\n")
            replies.flush()
    return 0


def _keep(to_the_end: ExitStack, config: str) -> None:
    """Keep Ray, and idle engines, until the last trial is done."""
    from rlhf.config.files.load import load

    (run,) = load(config).runs.values()
    from actors.cluster.connect import connected
    from actors.run.engine_pool import ENGINE_POOL

    to_the_end.enter_context(connected(run.cluster))
    to_the_end.callback(ENGINE_POOL.close)
    ENGINE_POOL.keeps = True


if __name__ == "__main__":
    exit_code = run_trials()
    leave_stuck_threads(exit_code)
    sys.exit(exit_code)

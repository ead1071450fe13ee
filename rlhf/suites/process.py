"""Start the process that asks suites, wait for its answers, and turn the answers into reports and samples."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter

from rlhf.errors import RunError, UserError
from rlhf.process.owned_folders import temporary_folder
from rlhf.suites.program import FAILURE, INPUTS, PLAN, RESULTS
from rlhf.suites.spec import LOST, MODEL, Endpoint, SuiteAnswers, SuitePlan, SuiteSpec

logger = logging.getLogger(__name__)
PREPARES_WITHIN_S = 3600.0  # data sets may have to be downloaded
END_WITHIN_S = 10.0
_LAST_CHARACTERS = 1500  # of the process's output in a message


async def plan_suites(spec: SuiteSpec) -> SuitePlan:
    """Load the suites without asking a model. UserError: a suite is unknown, or its data cannot be loaded."""
    with temporary_folder() as folder:
        await _run(spec, None, folder, lambda done, total: None, silent_s=PREPARES_WITHIN_S)
        plan: SuitePlan = TypeAdapter(SuitePlan).validate_json((folder / PLAN).read_text())
        return plan


async def ask_suites(
    spec: SuiteSpec,
    fronts: Callable[[str, str], Awaitable[Sequence[str]]],
    *,
    stored: Path,
    deadline_s: float,
    progress: Callable[[int, int], None],
) -> list[SuiteAnswers]:
    """Ask all questions, and once more those that a lost engine left. RunError: a suite has no answer at all.

    Args:
        fronts: returns the base URLs of the engines' fronts, given a key for calls and a name of the model.
        stored: a file with answers of an interrupted process, read and continued.
        deadline_s: from a request to its answer.
        progress: called with the answered requests and all requests.
    """
    key = secrets.token_urlsafe(32)
    for is_last in (False, True):
        endpoint = Endpoint(urls=tuple(await fronts(key, MODEL)), key=key, deadline_s=deadline_s, answers=stored)
        with temporary_folder() as folder:
            await _run(spec, endpoint, folder, progress, silent_s=PREPARES_WITHIN_S + deadline_s)
            lines = (folder / RESULTS).read_text().splitlines()
        suites = [TypeAdapter(SuiteAnswers).validate_json(line) for line in lines]
        failures = {suite.name: [q.failure for q in suite.questions if q.failure is not None] for suite in suites}
        if is_last or not any(failure.startswith(LOST) for failed in failures.values() for failure in failed):
            break
    for suite in suites:
        if len(failed := failures[suite.name]) == len(suite.questions):
            raise RunError(f"suite {suite.name}: no question has an answer ({len(failed)}); the first: {failed[0]}")
    return suites


async def _run(
    spec: SuiteSpec,
    endpoint: Endpoint | None,
    folder: Path,
    progress: Callable[[int, int], None],
    *,
    silent_s: float,
) -> None:
    inputs = {"spec": asdict(spec), "endpoint": None if endpoint is None else asdict(endpoint)}
    with os.fdopen(os.open(folder / INPUTS, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:  # the key is a secret
        file.write(json.dumps(inputs, default=str))
    output = folder / "output.txt"
    with output.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "rlhf.suites.program", str(folder)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=file,
            env=_environment(spec),
            start_new_session=True,
        )
    assert process.stdout is not None
    try:
        while line := await asyncio.wait_for(process.stdout.readline(), silent_s):
            done, total = line.split()
            progress(int(done), int(total))
        await asyncio.wait_for(process.wait(), END_WITHIN_S)
    except TimeoutError as error:
        raise RunError(f"suites {', '.join(spec.names)}: no progress within {silent_s:g} s") from error
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    text = output.read_text(errors="replace")
    if process.returncode:
        raise _failure(folder, spec, text)
    for sentence in text.splitlines():
        if "lost their beginning" in sentence:
            logger.warning("suites: %s", sentence)


def _failure(folder: Path, spec: SuiteSpec, output: str) -> UserError | RunError:
    with suppress(OSError, ValueError):
        kind, message = json.loads((folder / FAILURE).read_text())
        return (UserError if kind == "UserError" else RunError)(message)
    return RunError(f"the process of suites {', '.join(spec.names)} died:\n{output[-_LAST_CHARACTERS:]}")


def _environment(spec: SuiteSpec) -> dict[str, str]:
    """Return the environment. With a folder of data, and where the hub is switched off, nothing is fetched."""
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    is_offline = spec.data is not None or os.environ.get("HF_HUB_OFFLINE") == "1"
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    nltk = {} if spec.data is None else {"NLTK_DATA": str(Path(spec.data, "nltk_data").resolve())}
    path = os.pathsep.join(part for part in paths if part)
    return {**os.environ, **quiet, **(offline if is_offline else {}), **nltk, "PYTHONPATH": path}

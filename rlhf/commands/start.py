"""Start the roles of a run for a loop of your own in Python: `async with rlhf.start(CONFIG) as loop`."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from rlhf.commands.shared import AnyConfig, loaded_config
from rlhf.errors import UserError
from rlhf.extensions import refuse_start
from rlhf.passed_objects import forgotten_afterwards

if TYPE_CHECKING:
    from rlhf.controller.own_loop import OwnLoop
    from rlhf.tracking.sinks.backends import TrackerBackend

logger = logging.getLogger(__name__)
_open: list[str] = []  # the name of the run with an open block


class LoopBlock(AbstractAsyncContextManager["OwnLoop"]):
    """Start the roles at the beginning of an `async with` block, and end them with the block. Any other use fails."""

    def __init__(self, block: AbstractAsyncContextManager[OwnLoop]) -> None:
        self._block = block

    async def __aenter__(self) -> OwnLoop:
        return await self._block.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        return await self._block.__aexit__(kind, error, traceback)

    def __await__(self) -> NoReturn:
        self._refuse("is awaited")

    def __enter__(self) -> NoReturn:
        self._refuse("is entered by `with`")

    def __exit__(self, *error: object) -> None: ...

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # asked for by Python and by libraries
            raise AttributeError(name)
        self._refuse(f"has not started the roles, so it has no {name}")

    def _refuse(self, what: str) -> NoReturn:
        raise UserError(
            f"rlhf.start {what}. Write `async with rlhf.start(CONFIG) as loop:` inside an `async def`, and call the "
            "methods of `loop` in this block. In a script, `asyncio.run(main())` runs the function."
        )


def start(
    config: AnyConfig,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    trackers: Sequence[TrackerBackend | type[TrackerBackend]] = (),
) -> LoopBlock:
    """Start the roles of an online run, and yield the roles to a loop of your own. The roles end with the block.

    The engines have the policy's weights when the block begins. An exception in the block ends the roles at once, and
    the run's folder records the exception. After Ctrl-C the run counts as stopped.

    Args:
        config: of one online run, as `rlhf.train` takes it. `overrides` changes its keys.
        resume: continue from the newest checkpoint of `OwnLoop.save`, if any.
        overwrite: replace the run in the folder of run.name.
        quiet: show no progress.
        trackers: views, besides the trackers of the configuration.

    Raises:
        UserError: the input is wrong, or another block of `rlhf.start` is open in this process.
        RunError: a role failed. WorkerLost: a process of a role is lost; the message names the role and the rank.
    """
    return LoopBlock(_started(config, overrides, resume=resume, overwrite=overwrite, quiet=quiet, trackers=trackers))


@asynccontextmanager
async def _started(
    config: AnyConfig,
    overrides: Sequence[str],
    *,
    resume: bool,
    overwrite: bool,
    quiet: bool,
    trackers: Sequence[TrackerBackend | type[TrackerBackend]],
) -> AsyncIterator[OwnLoop]:
    refuse_start("rlhf.start")
    if _open:
        raise UserError(
            f"rlhf.start: the block of run {_open[0]} is still open in this process. Leave that block first."
        )
    from rlhf.config.schema.stages import run_folder
    from rlhf.preflight.start import Start
    from rlhf.tracking import logs
    from rlhf.tracking.run_folder.folder import refuse_other_run

    with forgotten_afterwards():
        loaded = loaded_config(config, overrides)
        logs.configure()
        if not resume and not overwrite:
            for stage in loaded.stages.values():
                refuse_other_run(run_folder(stage))
        logger.info("%s: loading PyTorch, Ray and vLLM", loaded.name)
        from actors.run.own_loop import own_loop

        options = Start(resume=resume, overwrite=overwrite, mode="quiet" if quiet else "auto", trackers=trackers)
        _open.append(loaded.name)
        try:
            async with own_loop(loaded, options) as loop:
                yield loop
        finally:
            _open.clear()

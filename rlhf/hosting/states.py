"""Keep the saved state of a model on disk: the newest one alone, with checksums."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

from rlhf.errors import RunError, WorkerLost
from rlhf.hosting.request_line import Saved
from rlhf.tracking.run_folder.atomic import sync_tree
from rlhf.tracking.run_folder.manifest import Manifest, find_damage

logger = logging.getLogger(__name__)


class SavedStates:
    """The states of a model in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def write(self, saved: Saved, save: Callable[[Path], Awaitable[None]]) -> bool:
        """Let `save` fill a folder. False: the state cannot be saved now."""
        folder = self.folder / saved.folder
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            await save(folder / "adapter")
            await asyncio.to_thread(_seal, folder, saved.step)
        except WorkerLost:
            raise
        except (RunError, OSError) as error:
            logger.warning("%s: the state after request %d could not be saved: %s", folder, saved.seq_id, error)
            return False
        return True

    async def sound(self, saved: Saved) -> Path:
        """Return the adapter of a state after reading every byte. RunError: the state is damaged."""
        folder = self.folder / saved.folder
        if (damage := await asyncio.to_thread(find_damage, folder, step=saved.step)) is not None:
            raise RunError(f"The saved state {folder} is damaged: {damage}")
        return folder / "adapter"

    def keep(self, saved: Saved) -> None:
        """Remove all other states."""
        for folder in self.folder.iterdir():
            if folder.name != saved.folder:
                shutil.rmtree(folder, ignore_errors=True)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _seal(folder: Path, step: int) -> None:
    Manifest.of(folder, step=step).write(folder)
    sync_tree(folder)

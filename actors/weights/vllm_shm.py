"""The engine's end of the shared-memory transport, inside vLLM's workers."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import torch

from actors.weights.checksum import Checksum
from actors.weights.manifest import WeightManifest
from actors.weights.vllm_reload import ReloadEngine


class ShmEngine(ReloadEngine):
    """Reads the memory in place. It stays mapped from one sync to the next."""

    mapped: tuple[str, int, int] = ("", 0, 0)  # path, inode and size of the memory that `flat` maps
    flat = torch.empty(0, dtype=torch.uint8)

    def receive(self, manifest: WeightManifest) -> None:
        """Load every tensor out of the mapped memory, and at the same time take the checksum of its bytes."""
        path = manifest.fields["path"]
        published = (path, os.stat(path).st_ino, manifest.nbytes)  # another process may come to have the same path
        if published != self.mapped:
            self.flat = torch.from_file(path, shared=True, size=manifest.nbytes, dtype=torch.uint8)
            self.mapped = published
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="weights-hash") as hashing:
            checksum = Checksum()
            added = hashing.submit(checksum.add, self.flat)
            self.load(manifest.views(self.flat))
        added.result()
        self.checksum = checksum.hexdigest()

    def shutdown(self) -> None:
        """Unmap the trainer's shared memory."""
        self.mapped, self.flat = ("", 0, 0), torch.empty(0, dtype=torch.uint8)

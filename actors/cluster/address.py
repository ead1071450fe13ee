"""Find the Ray cluster of a run. Imports no Ray, so `rlhf doctor` can use it when Ray is broken."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from rlhf.errors import UserError


def cluster_to_join(configured: str | None) -> str | None:
    """Return the address of the cluster to join, with `auto` resolved. Return None if the run starts a local Ray.

    `auto` means the cluster of RAY_ADDRESS (set by `ray job submit`), or else the cluster recorded by `ray start` on
    this machine. Ray's own lookup would also join a local Ray of another run.
    """
    named = os.environ.get("RAY_ADDRESS") or None
    address = configured or named
    if address == "auto":
        address = named if named not in (None, "auto") else started_here()
        if address is None:
            raise UserError(
                "cluster.address or RAY_ADDRESS is auto, but no cluster was started on this machine with `ray start` "
                f"({word_of_cluster()} does not exist). Start one with `ray start --head`, name a cluster as "
                "HOST:PORT, or leave cluster.address null for a local Ray."
            )
    if address is not None and address.startswith(("http://", "https://")):
        raise UserError(
            f"{address} (cluster.address or RAY_ADDRESS) is the address of a dashboard, for `ray job submit`. A run "
            "needs the address of the cluster itself, as HOST:PORT. On a machine of the cluster, cluster.address=auto "
            "also works. To start a local Ray instead, unset RAY_ADDRESS."
        )
    return None if address == "local" else address


def started_here() -> str | None:
    """Return the address of the cluster last started or joined by `ray start` here. It may have ended since."""
    try:
        return word_of_cluster().read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def word_of_cluster() -> Path:
    """Return the file for the address recorded by `ray start`."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or tempfile.gettempdir()
    return Path(folder) / "ray" / "ray_current_cluster"

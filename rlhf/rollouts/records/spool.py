"""Finished groups on disk, so that a resumed run trains on the very same rollouts.

One file a group, named by group id and the version of the newest token's weights, written whole or not at all. A file
speaks for a request only if prompt, seeds, sampling and environment are the same.
"""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rlhf.deferred import safetensors_torch
from rlhf.rollouts.records.ledgers import request_identity
from rlhf.tracking.run_folder.atomic import write_aside
from rlhf.types import (
    GroupRequest,
    RankedRollouts,
    RewardError,
    RolloutInfo,
    Rollouts,
    RoutedRollouts,
    Sampling,
    SessionEnd,
    StepReward,
    Turn,
    oldest_version,
)

logger = logging.getLogger(__name__)


def stored_groups(folder: Path) -> dict[Path, int]:
    """Return the files of all spooled groups, with the ids of their groups."""
    return {path: int(path.name.split("_")[1]) for path in folder.glob("group_*.safetensors")}


def drop_untrained(folder: Path) -> None:
    """Delete the groups with a failed environment or without a trained token. A resumed run plays them again."""
    for path in stored_groups(folder):
        with safe_open(path, framework="pt") as file:
            infos = json.loads((file.metadata() or {}).get("infos", "[]"))
        failed = any(info["environment_error"] is not None for info in infos)
        if failed or not any(info["num_response_tokens"] for info in infos):
            path.unlink(missing_ok=True)


def forget_after(folder: Path, version: int) -> int:
    """Delete the groups with a token newer than `version`, because these weights are trained again. Return their
    number.
    """
    newer = [path for path in stored_groups(folder) if _version(path) > version]
    for path in newer:
        path.unlink(missing_ok=True)
    return len(newer)


def retain_sampled_by(folder: Path, version: int, weights: str) -> None:
    """Delete the spooled groups except groups of this version with this checksum of the weights."""
    for path in stored_groups(folder):
        if _version(path) != version or _weights(path) != weights:
            path.unlink(missing_ok=True)


def _version(path: Path) -> int:
    return int(path.stem.rpartition("_v")[2])


def _weights(path: Path) -> str | None:
    """Return the checksum in a file. None: the file is damaged."""
    with suppress(SafetensorError), safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("weights")
    return None


def group_path(folder: Path, group_id: int, version: int) -> Path:
    return folder / f"group_{group_id:08d}_v{version:06d}.safetensors"


def write_group(
    folder: Path,
    request: GroupRequest,
    sampling: Sampling,
    version: int,
    rollouts: Rollouts,
    infos: tuple[RolloutInfo, ...],
    *,
    environment: str = "",
    weights: str = "",
) -> None:
    """Write a finished group aside, then rename the file. A missing folder no longer belongs to this run.

    `weights` is the checksum of the weights, or "" if the weights changed within the group. A resumed run with changed
    settings makes different weights of the same version.
    """
    path = group_path(folder, request.group_id, version)
    columns = {field.name: getattr(rollouts, field.name).contiguous() for field in fields(rollouts)}
    infos_json = json.dumps([asdict(info) for info in infos])
    metadata = {**_identity(request, sampling, environment), "infos": infos_json, "weights": weights}
    needed = sum(column.nbytes for column in columns.values())
    write_aside(path, lambda aside: safetensors_torch.save_file(columns, aside, metadata=metadata), needed=needed)


def read_group(
    folder: Path,
    request: GroupRequest,
    sampling: Sampling,
    version: int,
    *,
    oldest: int | None = None,
    environment: str = "",
    weights: str | None = None,
) -> tuple[Rollouts, tuple[RolloutInfo, ...]] | None:
    """Return the group from a whole file for exactly this request, or None.

    Args:
        version: version of the newest token's weights.
        oldest: a group with a token older than this version is deleted. None: any age is allowed.
        weights: required checksum of the sampling weights. None: any weights of the version.
    """
    path = group_path(folder, request.group_id, version)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            wanted = _identity(request, sampling, environment) | ({} if weights is None else {"weights": weights})
            if any(metadata.get(key) != value for key, value in wanted.items()):
                return None
            infos = tuple(_info(row) for row in json.loads(metadata["infos"]))
            first = oldest_version(infos)
            if oldest is not None and first is not None and first < oldest:
                path.unlink(missing_ok=True)
                return None
            names = set(file.keys())
            kind = RoutedRollouts if "experts" in names else RankedRollouts if "top_ids" in names else Rollouts
            rollouts = kind(**{field.name: file.get_tensor(field.name) for field in fields(kind)})
    except (SafetensorError, ValueError, KeyError, TypeError) as error:  # also from a release with other scalars
        logger.warning("%s is damaged (%s); its group is sampled again", path, error)
        return None
    return rollouts, infos


def _info(row: dict[str, Any]) -> RolloutInfo:
    rewards, error = row.pop("environment_rewards"), row.pop("environment_error")
    session, turns = row.pop("session", None), row.pop("turns")
    return RolloutInfo(
        **row,
        turns=tuple(Turn(**turn) for turn in turns),
        environment_rewards=None if rewards is None else tuple(StepReward(**reward) for reward in rewards),
        environment_error=None if error is None else RewardError(**error),
        session=None if session is None else SessionEnd(**session | {"broken": tuple(session["broken"])}),
    )


def _identity(request: GroupRequest, sampling: Sampling, environment: str) -> dict[str, str]:
    return {**request_identity(request, sampling), "environment": environment}

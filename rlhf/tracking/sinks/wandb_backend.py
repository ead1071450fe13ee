"""W&B as a tracker back end: offline (files in the run folder, `wandb sync` later) or online.

The driver opens W&B once; nothing else in the project calls W&B. W&B is a view of the run folder and holds no
additional data. W&B may fail the start of a run, but never hangs the start and never stops a running run.
"""

from __future__ import annotations

import logging
import math
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from rlhf.errors import RunError, UserError
from rlhf.process.stopping import start_thread
from rlhf.tracking.diagnosis.findings import Severity
from rlhf.tracking.logs import redact, redact_config
from rlhf.tracking.metrics.histograms import trimmed
from rlhf.tracking.run_folder.atomic import write_atomic
from rlhf.tracking.run_folder.environment import git_state
from rlhf.tracking.sinks.backends import TrackedStep, TrackerBackend

if TYPE_CHECKING:
    import wandb
    from PIL.Image import Image

logger = logging.getLogger(__name__)

_MARGIN_S = 10.0  # our deadlines come so much later than W&B's, and cover everything else
MOST_IMAGES = 4  # of a row
MOST_STEP_IMAGES = 16  # of a split, for trackers without images in tables
MOST_ROWS = 64  # rows in a step's table of one split; samples/ has all rows
_USERS_DATA_DIR = os.environ.get("WANDB_DATA_DIR")


def open_wandb(
    folder: Path,
    *,
    mode: Literal["offline", "online"],
    project: str,
    name: str,
    config: Mapping[str, Any],
    entity: str | None = None,
    job_type: str | None = None,
    group: str | None = None,
    tags: Sequence[str] = (),
    checkpoints: bool = False,
    image_of: Callable[[str], Image] | None = None,
    timeout_s: float = 60.0,
) -> WandbBackend:
    """Start, or after a resume continue, the run folder's W&B run (with the id in <folder>/wandb_run_id).

    `config` is masked before leaving the process, and gets the state of the repository as `git`. checkpoints: store
    checkpoints and the final model as artifacts. image_of: returns a small version of an image by its name; None: the
    tables name images. UserError: online without credentials. RunError: W&B did not start within timeout_s.
    """
    import wandb

    id_path = folder / "wandb_run_id"
    if not id_path.exists():
        write_atomic(id_path, uuid.uuid4().hex[:12] + "\n")
    run_id = id_path.read_text(encoding="utf-8").strip()
    git = git_state()
    # Artifact files wait there for `wandb sync`: in the run's folder, not in the user's home.
    os.environ["WANDB_DATA_DIR"] = _USERS_DATA_DIR or str((folder / "wandb").resolve())

    def start() -> wandb.Run:
        if mode == "online" and not wandb.login(prompt=False):
            raise UserError(
                "tracking.wandb is online, but W&B has no credentials here: set WANDB_API_KEY, run `wandb login`, or "
                "set tracking.wandb=offline."
            )
        return wandb.init(
            mode=mode,
            dir=folder,
            id=run_id,
            entity=entity,
            project=project,
            name=name,
            job_type=job_type,
            group=group,
            tags=list(tags),
            config={**plain(redact_config(config)), "git": git or {}},
            resume="allow" if mode == "online" else None,  # offline, there is no server with the id
            settings=wandb.Settings(
                init_timeout=timeout_s,
                finish_timeout=timeout_s,  # also at the interpreter's exit, when no thread can be abandoned
                finish_timeout_raises=True,
                console="off",
                silent=True,
                disable_code=True,
                disable_git=True,  # W&B would read the remote's URL, possibly with a token
                git_commit=git["commit"] if git else None,
                x_disable_meta=True,  # W&B would upload the command line, possibly with secrets
            ),
        )

    future, _ = start_thread(start, "starting W&B")
    try:
        run = future.result(timeout_s + _MARGIN_S)
    except (wandb.errors.Error, TimeoutError, OSError) as error:
        why = redact(str(error)).rstrip(".") or f"waited {timeout_s + _MARGIN_S:g} s for W&B"
        raise RunError(
            f"tracking: W&B did not start ({mode}): {why}. Set tracking.wandb=offline, or off; metrics.jsonl is "
            "written in any case."
        ) from error
    run.define_metric("step")
    run.define_metric("*", step_metric="step")  # W&B's counter restarts at 0 in a resumed offline run
    return WandbBackend(run, folder, checkpoints=checkpoints, image_of=image_of)


class WandbBackend(TrackerBackend):
    """A started W&B run."""

    name = "W&B"

    def __init__(
        self, run: wandb.Run, folder: Path, *, checkpoints: bool, image_of: Callable[[str], Image] | None
    ) -> None:
        self._run, self._folder, self._checkpoints, self._image_of = run, folder, checkpoints, image_of

    def log(self, step: TrackedStep) -> None:
        """Queue one row with histograms and tables of samples. W&B's background process writes or sends the row."""
        import wandb

        row: dict[str, Any] = {"step": step.step, **step.metrics}
        row = {key: value for key, value in row.items() if value is not None}
        for key, histogram in step.histograms.items():
            form = trimmed(histogram)
            row[key] = wandb.Histogram(np_histogram=(form["counts"], form["edges"]))
        for split, (columns, rows) in tables(step.samples()).items():
            if "images" in columns:
                columns, rows = self._with_images(columns, rows)
            row[f"samples/{split}"] = wandb.Table(columns=columns, data=rows, allow_mixed_types=True)
        self._run.log(row)

    def _with_images(self, columns: list[str], rows: list[list[Any]]) -> tuple[list[str], list[list[Any]]]:
        """Return a table with a column for each of a row's first images, behind the column of their names."""
        import wandb

        names = [str(row[columns.index("images")]).split() for row in rows]
        shown = min(max(map(len, names)), MOST_IMAGES) if self._image_of is not None else 0
        made: dict[str, wandb.Image | None] = {}

        def image(name: str) -> wandb.Image | None:
            if name not in made and self._image_of is not None:
                try:
                    made[name] = wandb.Image(self._image_of(name), caption=name)
                except (RunError, UserError) as error:
                    logger.warning("W&B does not show image %s: %s", name, error)
                    made[name] = None
            return made[name]

        columns = [*columns, *(f"image_{i}" for i in range(1, shown + 1))]
        pictured = [
            [*row, *(image(of[i]) if i < len(of) else None for i in range(shown))]
            for row, of in zip(rows, names, strict=True)
        ]
        return columns, pictured

    def alert(self, severity: Severity, title: str, text: str) -> None:
        self._run.alert(title=title[:63], text=text, level="ERROR" if severity == "failure" else "WARN")

    def checkpoint(self, step: int, folder: Path) -> None:
        """Add a new version of the run's checkpoint, if checkpoints are kept."""
        if self._checkpoints:
            self._keep("checkpoint", folder, aliases=("latest", f"step-{step}"), metadata={"step": step})

    def close(self, *, failed: bool) -> None:
        """Add the timeline and, if checkpoints are kept, the final model; wait for W&B to write or send the rest."""
        timeline, final = self._folder / "timeline.json", self._folder / "final"
        if timeline.exists():
            self._keep("timeline", timeline)
        if self._checkpoints and final.exists():
            self._keep("model", final)
        self._run.finish(exit_code=1 if failed else 0)

    def _keep(
        self, kind: str, path: Path, *, aliases: Sequence[str] = ("latest",), metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Add a file or folder as an artifact of this run. Files due for removal or rewriting are copied."""
        import wandb

        artifact = wandb.Artifact(f"{kind}-{self._run.id}", type=kind, metadata=dict(metadata or {}))
        policy, top = "immutable" if kind == "model" else "mutable", path if path.is_dir() else path.parent
        try:
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                if file.is_file():
                    artifact.add_file(str(file), name=str(file.relative_to(top)), policy=policy)
        except (FileNotFoundError, ValueError) as error:
            logger.warning("%s was removed before W&B had read the file, so W&B has no copy (%s)", path, error)
            return
        self._run.log_artifact(artifact, aliases=list(aliases))


def plain(value: Any) -> Any:
    """Return a config tree of mappings and scalars. Lists become words with commas, because W&B cannot plot lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        if any(isinstance(item, Mapping | list | tuple) for item in value):
            return {str(index): plain(item) for index, item in enumerate(value)}
        return ", ".join(map(str, value))
    return value


def tables(samples: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Return columns and rows of a table for each split of a step's samples, with at most MOST_ROWS rows.

    Secrets are masked. An evaluation stage writes a set in place of the split. Only examples with a response are shown.
    If a row has images, column `images` has the names of each row's images with spaces between them.
    """
    by_split: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        if "response" in sample:
            by_split.setdefault(sample.get("split") or sample["set"], []).append(sample)
    tables_by_split = {}
    for split, rows in by_split.items():
        rewards = sorted({name for row in rows for name in row.get("scores") or {}})
        has_images = any(row.get("images") for row in rows[:MOST_ROWS])
        cells = [_cells(row, rewards, has_images=has_images) for row in rows[:MOST_ROWS]]
        tables_by_split[split] = (list(cells[0]), [list(row.values()) for row in cells])
    return tables_by_split


def shown_images(
    by_split: Mapping[str, tuple[list[str], list[list[Any]]]], image_of: Callable[[str], Image] | None
) -> dict[str, dict[str, Image]]:
    """Return small images by name for each split of `tables`, the first MOST_STEP_IMAGES of a split.

    image_of: returns a small version of an image by its name. A missing or damaged image is left out, with a warning.
    """
    shown: dict[str, dict[str, Image]] = {}
    if image_of is None:
        return shown
    for split, (columns, rows) in by_split.items():
        names = [str(row[columns.index("images")]).split() for row in rows] if "images" in columns else []
        for name in islice(dict.fromkeys(chain.from_iterable(names)), MOST_STEP_IMAGES):
            try:
                shown.setdefault(split, {})[name] = image_of(name)
            except (RunError, UserError) as error:
                logger.warning("A tracker does not show image %s: %s", name, error)
    return shown


def _cells(row: Mapping[str, Any], rewards: Sequence[str], *, has_images: bool) -> dict[str, Any]:
    scores, old = row.get("scores") or {}, _mean_logprob(row, "old")
    return {
        **{name: row.get(name) for name in ("group_id", "sample")},
        **{name: redact(row[name]) for name in ("prompt", "response")},
        **({"images": " ".join(row.get("images") or ())} if has_images else {}),
        "score": row.get("score"),
        **{f"score/{name}": scores.get(name) for name in rewards},
        **{name: row.get(name) for name in ("advantage", "response_tokens", "truncated")},
        "old_minus_rollout_logprob": _difference(old, row.get("mean_rollout_logprob")),
        "old_minus_ref_logprob": _difference(old, _mean_logprob(row, "ref")),
    }


def _mean_logprob(row: Mapping[str, Any], whose: str) -> float | None:
    """Return the recorded mean over the sampled tokens, or else the mean of the recorded values."""
    mean: float | None = row.get(f"mean_{whose}_logprob")
    values = [value for value in (row.get("tokens") or {}).get(f"{whose}_logprobs") or () if value is not None]
    return fmean(values) if mean is None and values else mean


def _difference(left: float | None, right: float | None) -> float | None:
    return left - right if left is not None and right is not None and math.isfinite(left - right) else None

"""The table of tested architectures: measurements on tiny random models of each type.

`support.csv` has a line for each model type. tests/support_measurements.py writes, and docs/models.md shows the table.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from rlhf.errors import UserError
from rlhf.vision.kinds import SEE_BOTH_WAYS, VISION_KINDS

_TITLES = ("model type", "kind", "sequences", "reward head", "LoRA", "export", "engines", "engine after a sync, nats")


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """Measurements of a model type."""

    model_type: str
    kind: str  # dense, mixture (of experts), hybrid, or hybrid mixture
    sequences: str  # the layout of a micro-batch
    reward_head: str  # "yes" or "no", like the next two
    lora: str
    export: str
    engines: str  # the devices on which an engine may start: any, GPU, or none; or untested
    engine: str  # largest difference after a weight sync in nats, or the reason why there is none


@cache
def support_by_type() -> Mapping[str, Support]:
    with Path(__file__).with_name("support.csv").open(encoding="utf-8", newline="") as file:
        return {row["model_type"]: Support(**row) for row in csv.DictReader(file)}


def refuse_without_engine(config: Mapping[str, Any], *, device: Literal["cpu", "cuda"]) -> None:
    """Raise UserError for a model type without an engine on this device, by the table and by measurements of images."""
    kind = config["model_type"]
    if device == "cpu" and kind in SEE_BOTH_WAYS:
        raise UserError(
            f"no engine on a CPU can sample from models of type {kind}: the tokens of an image attend to each other, "
            "but in vLLM on a CPU only to earlier tokens, so the engine would see images otherwise than the policy "
            "(docs/models.md). Use GPUs, or another model."
        )
    row = support_by_type().get(kind)
    if row is None or not (row.engines == "none" or (row.engines == "GPU" and device == "cpu")):
        return
    advice = "Use GPUs, or another model." if row.engines == "GPU" else "Use another model."
    raise UserError(f"no engine can sample from models of type {kind}: {row.engine} (docs/models.md). {advice}")


def untested_model(config: Mapping[str, Any]) -> str | None:
    """Return the sentence about a model of a type without measurements. None: the type is in the table."""
    kind = (config.get("text_config") or config).get("model_type", "")
    if kind in support_by_type() or config.get("model_type") in VISION_KINDS:
        return None
    return (
        f"no test has run with models of type {kind or 'unknown'} (docs/models.md). A worker checks the forward pass "
        "of each model, and a probe checks every weight sync."
    )


def support_table() -> str:
    rows = sorted(map(astuple, support_by_type().values()))
    lines = [_TITLES, ["---"] * len(_TITLES), *([f"`{kind}`", *cells] for kind, *cells in rows)]
    return "".join(map(_line, lines))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def main(page: Path) -> None:
    """Replace the table at the end of a page."""
    text = page.read_text(encoding="utf-8")
    page.write_text(text[: text.index(_line(_TITLES))] + support_table(), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

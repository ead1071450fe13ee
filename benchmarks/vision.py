"""Measure vision models: rows and shared prompts of the trainer, and vLLM's engines, against single sequences.

The models are tiny and random, in float32, with weights four times as large as usual (rlhf/models/files/tiny_vision).
`python benchmarks/vision.py docs/models.md` writes the table into the page; without a page the table is printed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from rlhf.models.files.tiny_vision import KINDS
from rlhf.models.packed.branches import Branch
from rlhf.models.packed.forward import policy_logprobs_only
from rlhf.models.packed.row_check import check_rows
from rlhf.models.packed.row_layout import RowLayout
from rlhf.vision.kinds import SEE_BOTH_WAYS, is_vision_weight
from tests.fixtures.vision_models import Seeing, picture, seeing
from tests.integration.seen_engine import engine_differences

TITLES = (
    "kind",
    "model type",
    "sequences",
    "packed against single, nats",
    "shared image against single, nats",
    "tower's gradient",
    "another image, nats",
    "engine, nats",
    "engine after a sync, nats",
)
NAMES = {
    "gemma3": "Gemma 3",
    "idefics3": "Idefics3",
    "internvl": "InternVL",
    "llava": "LLaVA, Pixtral",
    "llava_onevision": "LLaVA-OneVision",
    "mistral3": "Mistral 3",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen2_vl": "Qwen2-VL",
    "qwen3_5": "Qwen3.5",
    "qwen3_vl": "Qwen3-VL",
    "smolvlm": "SmolVLM",
}
LAYOUTS = {
    RowLayout.ONE_BY_ONE: "one by one",
    RowLayout.PACKED: "packed",
    RowLayout.SHARED_PROMPTS: "packed, prompts shared",
}
RED, BLUE, WIDE = picture("red"), picture("blue"), picture("green", (64, 32))
ROWS: Sequence[tuple[list[Any], list[int]]] = [
    (["How are you?"], [12, 13]),
    ([RED, "Colour?"], [1, 2, 3]),
    ([BLUE, "Colour?"], [4, 5, 6, 7, 8]),
    (["Is ", WIDE, " like ", RED, "?"], [8, 9, 10, 11]),
]
ANSWERS = ([1, 2, 3], [4, 5], [6, 7, 8, 9])


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A row of the table. Numbers are the largest |difference|, of the gradient relative to its norm."""

    layout: RowLayout
    packed: float
    shared: float | None
    gradient: float
    effect: float
    engine: float
    synced_engine: float


def logprobs(model: Any, ids: Sequence[Tensor], branches: Any = None) -> Tensor:
    """Return the log-probabilities of all text tokens of a row but the first tokens of whole sequences."""
    row, lengths = torch.cat(list(ids)), torch.tensor([*map(len, ids)])
    mask = row >= 0
    starts = lengths.cumsum(0) - lengths
    mask[[int(s) for s, b in zip(starts, branches or [None] * len(ids), strict=True) if b is None]] = False
    columns: Tensor = policy_logprobs_only(model, row, lengths, mask=mask, branches=branches)
    return columns[mask]


def own_logprobs(sees: Seeing, parts: list[Any], response: list[int], *, cut: int = 0) -> Tensor:
    """Return the same of one sequence by transformers' processor and model, from token `cut` on."""
    ids = sees.ids(parts, response)
    hidden = sees.own_states(parts, response)
    logits = (hidden[:-1] @ sees.model.get_output_embeddings().weight.T).log_softmax(-1)
    chosen = [i for i in range(max(1, cut), len(ids)) if ids[i] >= 0]
    columns: Tensor = logits[[i - 1 for i in chosen]].gather(1, ids[chosen, None])[:, 0]
    return columns


def tower_gradient(model: Any, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    weights = [p.grad for name, p in model.named_parameters() if is_vision_weight(name) and p.grad is not None]
    return torch.cat([weight.flatten() for weight in weights])


def measure(kind: str, folder: Path) -> Measured:
    """Measure one kind of model."""
    sees = seeing(kind, folder)
    layout = check_rows(sees.model, torch.device("cpu"))
    rows = ROWS[:3] if kind == "llava_onevision" else ROWS  # transformers tiles a single image of a text alone
    ids = [sees.ids(*row) for row in rows]
    single = torch.cat([own_logprobs(sees, *row) for row in rows])
    packed = logprobs(sees.model, ids)
    wanted = tower_gradient(sees.model, torch.cat([own_logprobs(sees, *row) for row in rows]).sum())
    gradient = tower_gradient(sees.model, logprobs(sees.model, ids).sum())
    with torch.no_grad():
        red, blue = (own_logprobs(sees, [image, "Colour?"], [1, 2, 3]) for image in (RED, BLUE))
        shared = None
        if layout is RowLayout.SHARED_PROMPTS:
            prompt = len(sees.ids([BLUE, "Colour?"], []))
            cuts = [0, prompt, prompt]
            branched = [sees.ids([BLUE, "Colour?"], a)[cut:] for a, cut in zip(ANSWERS, cuts, strict=True)]
            branches = [None, *[Branch(of=0, length=prompt)] * 2]
            expected = [own_logprobs(sees, [BLUE, "Colour?"], a, cut=c) for a, c in zip(ANSWERS, cuts, strict=True)]
            shared = _worst(logprobs(sees.model, branched, branches), torch.cat(expected))
    before, after = engine_differences(kind, folder / "engine")
    return Measured(
        layout=layout,
        packed=_worst(packed, single),
        shared=shared,
        gradient=float((gradient - wanted).norm() / wanted.norm()),
        effect=_worst(red, blue),
        engine=before,
        synced_engine=after,
    )


def _worst(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())


def table(kinds: Sequence[str]) -> str:
    """Return the table in Markdown."""
    lines: list[Sequence[str]] = [TITLES, ["---"] * len(TITLES)]
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(kind, Path(folder))
        model_type = "llava" if kind == "pixtral" else kind
        shared = "-" if row.shared is None else f"{row.shared:.0e}"
        numbers = [f"{row.packed:.0e}", shared, f"{row.gradient:.0e}", f"{row.effect:.2f}"]
        refused = " (refused on a CPU)" if model_type in SEE_BOTH_WAYS else ""
        numbers += [f"{row.engine:.0e}{refused}", f"{row.synced_engine:.0e}{refused}"]
        lines.append([NAMES[model_type], f"`{model_type}`", LAYOUTS[row.layout], *numbers])
        sys.stderr.write(f"{lines[-1]}\n")
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    """Measure all kinds, or those named, and write or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", nargs="?", type=Path)
    parser.add_argument("--kinds", nargs="*", default=[*KINDS])
    arguments = parser.parse_args()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    made = table(arguments.kinds)
    if arguments.page is None:
        sys.stdout.write(made)
        return
    text = arguments.page.read_text(encoding="utf-8")
    start = text.index(f"| {' | '.join(TITLES)} |")
    end = text.index("\n\n", start) + 1
    arguments.page.write_text(text[:start] + made + text[end:], encoding="utf-8")


if __name__ == "__main__":
    main()

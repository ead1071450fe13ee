"""Measure the columns of the table of tested architectures for each model type, on the tiny models of this folder.

`python -m tests.support_measurements` writes rlhf/models/support.csv again. The last column needs vLLM:
`python -m tests.support_measurements engine TYPE...` measures this column for some types, and leaves the rest
unchanged.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from rlhf.errors import UserError
from rlhf.models.adapters.lora import add_lora
from rlhf.models.files.export import export_model
from rlhf.models.files.loading import load_causal_lm, load_critic, load_tokenizer
from rlhf.models.files.tiny import VOCAB_SIZE, byte_tokenizer
from rlhf.models.files.weights import weight_sources
from rlhf.models.packed.by_sequence import mixers_of
from rlhf.models.packed.forward import policy_logprobs_only
from rlhf.models.packed.row_check import check_rows
from rlhf.models.packed.row_layout import RowLayout
from rlhf.models.routers.recording import routers_of
from rlhf.models.support import Support, support_by_type
from tests.tiny_architectures import ALL, tiny_model

PATH = Path(__file__).parents[1] / "rlhf" / "models" / "support.csv"
CPU = torch.device("cpu")
SEQUENCES = {
    RowLayout.SHARED_PROMPTS: "packed, prompts shared",
    RowLayout.PACKED: "packed",
    RowLayout.ONE_BY_ONE: "one by one",
}
LENGTHS = [9, 4, 12, 4]
NOT_MEASURED = "not measured"


def model_folder(folder: Path, model_type: str, **changes: Any) -> str:
    """A tiny model of a type, with the quickstart's tokenizer."""
    sizes = {"vocab_size": VOCAB_SIZE, "vocab_size_per_layer_input": VOCAB_SIZE, "max_position_embeddings": 256}
    tiny_model(model_type, **sizes | changes).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def measured(model_type: str) -> Support:
    """Measure all columns but the engine's two columns."""
    known = support_by_type().get(model_type)
    with tempfile.TemporaryDirectory() as name:
        source = model_folder(Path(name) / "model", model_type)
        model = load_causal_lm(source, dtype=torch.float32)
        layout = check_rows(model, CPU)
        expected, wanted = own_results(load_causal_lm(source, dtype=torch.float32))
        for budget in ([0, 1, 2, 3], [3, 1, 2, 0]):
            logprobs, gradient = results(model, budget)
            assert float((logprobs - expected).abs().max()) < 1e-4, "log-probabilities"
            assert float(torch.cosine_similarity(gradient, wanted, dim=0)) > 0.9999, "gradient"
        return Support(
            model_type=model_type,
            kind=kind_of(model),
            sequences=SEQUENCES[layout],
            reward_head=word(has_reward_head(source)),
            lora=word(adapts(source, Path(name) / "merged")),
            export=word(survives_export(source, Path(name) / "final")),
            engines="untested" if known is None else known.engines,
            engine=NOT_MEASURED if known is None else known.engine,
        )


def word(value: bool) -> str:
    return "yes" if value else "no"


def kind_of(model: Any) -> str:
    hybrid = any(type(one).__name__ != "Llama4TextAttention" for one in mixers_of(model)) or hasattr(model, "rwkv")
    words = ["hybrid"] * hybrid + ["mixture"] * bool(routers_of(model))
    return " ".join(words) or "dense"


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(256, (sum(LENGTHS),), generator=generator).split(LENGTHS))


def gradient_of(model: Any, loss: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])


def own_results(model: Any) -> tuple[Tensor, Tensor]:
    """Log-probabilities and their gradient, by transformers' own logits, a sequence at a time."""
    parts = []
    for ids in sequences():
        logprobs = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        parts.append(logprobs.gather(1, ids[1:, None])[:, 0])
    found = torch.cat(parts)
    return found.detach(), gradient_of(model, found @ weights(len(found)))


def weights(size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(2))


def results(model: Any, order: list[int]) -> tuple[Tensor, Tensor]:
    """Return the results of our pass over a row of the sequences in this order."""
    ids = sequences()
    row, lengths = torch.cat([ids[i] for i in order]), torch.tensor([LENGTHS[i] for i in order])
    mask = torch.ones(len(row), dtype=torch.bool)
    mask[lengths.cumsum(0) - lengths] = False
    parts = policy_logprobs_only(model, row, lengths, mask=mask).split(lengths.tolist())
    found = torch.cat([parts[order.index(i)][1:] for i in range(len(ids))])
    return found.detach(), gradient_of(model, found @ weights(len(found)))


def has_reward_head(source: str) -> bool:
    config = transformers.AutoConfig.from_pretrained(source)
    if type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return False
    try:
        critic = load_critic(source, dtype=torch.float32)
    except UserError:
        return False
    check_rows(critic, CPU)
    return True


def adapts(source: str, folder: Path) -> bool:
    """Return whether a trained adapter changes the model, and the merged weights equal the adapted model."""
    try:
        model = add_lora(load_causal_lm(source, dtype=torch.float32), rank=2, alpha=4.0, dropout=0.0)
    except (UserError, ValueError):  # the second by peft
        return False
    plain = logits_of(load_causal_lm(source, dtype=torch.float32))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.1, generator=generator)
    adapted = logits_of(model)
    try:
        merged = logits_of(load_causal_lm(exported(model, source, folder), dtype=torch.float32))
    except UserError:  # weights are missing
        return False
    return bool((adapted - plain).abs().max() > 1e-3) and bool((adapted - merged).abs().max() < 1e-3)


def survives_export(source: str, folder: Path) -> bool:
    """Return whether transformers loads the exported folder without losing a weight, and computes the same logits."""
    model = load_causal_lm(source, dtype=torch.float32)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        exported(model, source, folder), dtype=torch.float32, output_loading_info=True
    )
    lost = report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]
    return not lost and torch.equal(logits_of(loaded.eval()), logits_of(model))


def exported(model: Any, source: str, folder: Path) -> str:
    named = ((name, weight.clone()) for name, weight in published(model))
    export_model(folder, named, model, load_tokenizer(source), dtype=torch.float32)
    return str(folder)


def published(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights as a policy publishes them."""
    return (weight for source in weight_sources(model) for weight in source.published())


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(sequences()[2][None], use_cache=False).logits
    return logits


def put(row: Support) -> None:
    """Write a line of the table, and show the line."""
    support_by_type.cache_clear()
    rows = {**support_by_type(), row.model_type: row}
    with PATH.open("w", encoding="utf-8", newline="") as file:
        lines = csv.DictWriter(file, [field.name for field in fields(Support)], lineterminator="\n")
        lines.writeheader()
        lines.writerows(asdict(rows[name]) for name in sorted(rows))
    sys.stdout.write(f"{row}\n")
    sys.stdout.flush()


def main(arguments: Sequence[str]) -> None:
    first, *types = arguments or ["all"]
    if first == "engine":
        from tests.support_engines import difference  # with vLLM

        known = support_by_type()
        for name in types or [name for name, row in known.items() if row.engine == NOT_MEASURED]:
            put(replace(known[name], engine=difference(name)))
        return
    for name in [first, *types] if first != "all" else ALL:
        put(measured(name))


if __name__ == "__main__":
    main(sys.argv[1:])

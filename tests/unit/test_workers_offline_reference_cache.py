"""Reference log-probabilities on disk: named by content, and refused when damaged."""

from __future__ import annotations

from pathlib import Path

import torch

from rlhf.types import Examples, TokenValues
from rlhf.workers.offline.reference_cache import read_columns, reference_key, write_columns

EXAMPLES = Examples(
    sequence_ids=torch.tensor([0, 1]),
    lengths=torch.tensor([2, 3]),
    token_ids=torch.tensor([5, 6, 5, 7, 8]),
    loss_mask=torch.tensor([False, True, False, True, True]),
)
COLUMNS = TokenValues(
    sequence_ids=EXAMPLES.sequence_ids, lengths=EXAMPLES.lengths, values=torch.tensor([0.0, -1.0, 0.0, -2.0, -3.0])
)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "columns.safetensors"
    write_columns(path, COLUMNS)
    found = read_columns(path, EXAMPLES)
    assert found is not None
    assert torch.equal(found.values, COLUMNS.values)
    assert [file.name for file in path.parent.iterdir()] == ["columns.safetensors"]


def test_a_missing_cut_or_altered_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "columns.safetensors"
    assert read_columns(path, EXAMPLES) is None
    write_columns(path, COLUMNS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    assert read_columns(path, EXAMPLES) is None
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert read_columns(path, EXAMPLES) is None
    path.write_bytes(whole)
    assert read_columns(path, EXAMPLES) is not None


def test_columns_of_other_data_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "columns.safetensors"
    write_columns(path, COLUMNS)
    assert read_columns(path, EXAMPLES.take([1])) is None


def test_the_name_is_that_of_weights_and_data() -> None:
    weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0], dtype=torch.bfloat16)}
    key = reference_key("llama", weights.items(), EXAMPLES)
    assert key == reference_key("llama", weights.items(), EXAMPLES)
    assert key != reference_key("another", weights.items(), EXAMPLES)
    assert key != reference_key("llama", (weights | {"b": torch.tensor([4.0], dtype=torch.bfloat16)}).items(), EXAMPLES)
    assert key != reference_key("llama", weights.items(), EXAMPLES.take([1, 0]))
    other = Examples(
        sequence_ids=EXAMPLES.sequence_ids,
        lengths=EXAMPLES.lengths,
        token_ids=EXAMPLES.token_ids,
        loss_mask=torch.tensor([False, True, False, False, True]),
    )
    assert key != reference_key("llama", weights.items(), other)

"""Files of tensors and values come back unchanged, are safetensors, and hold nothing else."""

from __future__ import annotations

import enum
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from rlhf.engine import tensor_files
from rlhf.engine.tensor_files import read_tensors, to_json, write_tensors
from rlhf.errors import RunError, UserError
from tests.no_pickles import kinds_of

DTYPES = list(tensor_files._DTYPES)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@st.composite
def tensors(draw: Any) -> Tensor:
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 4), max_size=3))
    numel = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.tensor(draw(st.lists(st.booleans(), min_size=numel, max_size=numel)), dtype=dtype).view(shape)
    size = numel * torch.tensor([], dtype=dtype).element_size()
    content = draw(st.binary(min_size=size, max_size=size))  # also nan, and numbers below the normal ones
    return torch.frombuffer(bytearray(content), dtype=dtype).view(shape) if content else torch.zeros(shape, dtype=dtype)


def bits(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.dictionaries(st.text(), tensors(), max_size=5), values=st.dictionaries(st.text(), PLAIN, max_size=4))
def test_all_bits_come_back(tmp_path: Path, content: dict[str, Tensor], values: dict[str, Any]) -> None:
    content = {f"tensor {name}": tensor for name, tensor in content.items()}
    path = tmp_path / "file.safetensors"
    write_tensors(path, content, values)
    found, found_values = read_tensors(path)
    for same in (found, load_file(path)):
        assert {name: bits(tensor) for name, tensor in same.items()} == {name: bits(t) for name, t in content.items()}
    assert found_values == values
    assert to_json(found_values) == to_json(values)  # True is not 1, and 1 is not 1.0


def test_views_of_shared_memory_and_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor is written in parts, here of 5 bytes, and views of the same memory are separate tensors."""
    monkeypatch.setattr(tensor_files, "_PART_BYTES", 5)
    flat = torch.arange(12.0)
    content = {"flat": flat, "view": flat[3:7], "transposed": flat.view(3, 4).t(), "again": flat}
    write_tensors(tmp_path / "file", content, {})
    found, _ = read_tensors(tmp_path / "file")
    assert all(torch.equal(found[name], tensor) for name, tensor in content.items())
    assert not list(tmp_path.glob(".*")), "a file that was written aside is left"


def test_a_read_tensor_is_mapped_and_a_change_does_not_reach_the_file(tmp_path: Path) -> None:
    path, nbytes = tmp_path / "file", 2**26
    write_tensors(path, {"large": torch.ones(nbytes // 4)}, {})

    def in_memory() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

    before = in_memory()
    found, _ = read_tensors(path)
    assert float(found["large"].sum()) == nbytes / 4
    assert in_memory() < before + nbytes / 2
    found["large"].zero_()
    assert read_tensors(path)[0]["large"][0] == 1.0


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ((1, 2), "values['a'] is (1, 2), of type tuple"),
        ([{"b": {1: 2}}], "values['a'][0]['b'] is {1: 2}, of type dict"),
        (Colour.RED, "values['a'] is Colour.RED, of type Colour"),
        ([torch.zeros(1)], "values['a'][0] is tensor([0.]), of type Tensor"),
        (float("nan"), "values['a'] is nan, of type float"),
        (b"x", "values['a'] is b'x', of type bytes"),
        (torch.float32, "values['a'] is torch.float32, of type dtype"),
    ],
)
def test_a_value_that_is_not_plain_is_an_error_at_saving(tmp_path: Path, value: Any, place: str) -> None:
    with pytest.raises(RunError) as caught:
        write_tensors(tmp_path / "file", {}, {"a": value})
    assert f"cannot be saved: {place}." in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_tensor_of_an_unknown_type_is_an_error_at_saving(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"file cannot hold phase, a tensor of torch\.complex64"):
        write_tensors(tmp_path / "file", {"phase": torch.zeros(2, dtype=torch.complex64)}, {})


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def test_another_file_is_refused_and_runs_no_code(tmp_path: Path) -> None:
    path, marker = tmp_path / "file", tmp_path / "ran"
    write_tensors(path, {"a": torch.ones(3)}, {"b": 1})
    sound = path.read_bytes()
    header = json.dumps({"__metadata__": {"values": "[" * 100_000}}).encode()
    header += b" " * (-len(header) % 8)
    assert kinds_of(tmp_path) == {"file": "safetensors"}
    pickles = [pickle.dumps(Hostile(marker), protocol=protocol) for protocol in (0, 2, 5)]
    for content in (b"", sound[:-1], sound[:20], *pickles, len(header).to_bytes(8, "little") + header):
        path.write_bytes(content)
        assert content not in pickles or kinds_of(tmp_path) == {"file": "unknown"}
        with pytest.raises(UserError, match=rf"{path} cannot be read: .* Restore the file from a copy"):
            read_tensors(path)
    torch.save(Hostile(marker), path)
    assert kinds_of(tmp_path) == {"file": "unknown"}
    with pytest.raises(UserError, match=rf"{path} cannot be read: "):
        read_tensors(path)
    with pytest.raises(UserError, match="No such file"):
        read_tensors(tmp_path / "none")
    assert not marker.exists()

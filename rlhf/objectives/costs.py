"""Define the costs of the equations in memory and time. The module imports no torch, because a plan reads the costs.

Two cores of a Xeon with AVX-512 BF16 and no AMX tiles do 165 Gflop/s in bfloat16 and 320 in float32. Two cores of an
EPYC (Zen 5), with full-width bfloat16 dot products, do 900 and 220.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

CPUINFO = Path("/proc/cpuinfo")
Dtype = Literal["float32", "bfloat16"]
CHUNK_ROWS = 256  # rows of logits alive at once in float32: 48 MiB at a vocabulary of 49,152
CHUNKS_PER_PRODUCT = 4  # chunks per matrix product of logit gradients, and per addition to the weight's gradient


@cache
def multiplies_bfloat16_fast() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32: with AMX tiles, or with AMD's AVX-512 BF16."""
    words = set(CPUINFO.read_text().split()) if CPUINFO.exists() else set()
    return "amx_tile" in words or {"AuthenticAMD", "avx512_bf16"} <= words


def fast_dtype(device: str) -> Dtype:
    """Return the data type that a device, `cpu` or `cuda`, multiplies fastest. For `cpu`, the processor of this machine
    decides."""
    return "bfloat16" if device != "cpu" or multiplies_bfloat16_fast() else "float32"


def why_dtype(device: str) -> str:
    """Return the reason for `fast_dtype`, for a sentence that begins with the data type."""
    if device != "cpu":
        return "because the models are on GPUs"
    if multiplies_bfloat16_fast():
        return "because this CPU has fast instructions for bfloat16"
    return "because this CPU has no fast instructions for bfloat16"

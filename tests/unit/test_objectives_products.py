"""Some processors multiply bfloat16 faster than float32. On all other processors, products are computed in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf.objectives import costs
from rlhf.objectives.products import widens_products


@pytest.mark.parametrize(
    ("vendor", "flags", "fast"),
    [
        ("GenuineIntel", "avx512_bf16 amx_bf16 amx_tile", True),  # Sapphire Rapids
        ("GenuineIntel", "avx512_bf16", False),  # the same, with its tiles hidden from a virtual machine
        ("AuthenticAMD", "avx512f avx512_bf16", True),  # Zen 4 and 5
        ("AuthenticAMD", "avx512f", False),
    ],
)
def test_it_is_the_processor_that_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vendor: str, flags: str, fast: bool
) -> None:
    monkeypatch.setattr(costs, "CPUINFO", tmp_path / "cpuinfo")
    costs.CPUINFO.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags} sse\n")
    costs.multiplies_bfloat16_fast.cache_clear()
    try:
        assert widens_products(torch.ones(1, dtype=torch.bfloat16)) != fast
        assert not widens_products(torch.ones(1))
    finally:
        costs.multiplies_bfloat16_fast.cache_clear()

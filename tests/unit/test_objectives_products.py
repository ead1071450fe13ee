"""Which processors multiply bfloat16 faster than float32, and what is widened on the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf.objectives import products


@pytest.mark.parametrize(
    ("vendor", "amx", "avx512_bf16", "fast"),
    [
        ("GenuineIntel", True, True, True),  # Sapphire Rapids
        ("GenuineIntel", False, True, False),  # the same, with its tiles hidden from a virtual machine
        ("AuthenticAMD", False, True, True),  # Zen 4 and 5
        ("AuthenticAMD", False, False, False),
    ],
)
def test_it_is_the_processor_that_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vendor: str, amx: bool, avx512_bf16: bool, fast: bool
) -> None:
    monkeypatch.setattr(products, "CPUINFO", tmp_path / "cpuinfo")
    products.CPUINFO.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    products.multiplies_bfloat16_fast.cache_clear()
    try:
        assert products.widens_products(torch.ones(1, dtype=torch.bfloat16)) != fast
        assert not products.widens_products(torch.ones(1))
    finally:
        products.multiplies_bfloat16_fast.cache_clear()

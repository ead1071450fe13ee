"""How numbers and durations look in every table, line and bar."""

from __future__ import annotations

import math


def number(value: float) -> str:
    """Format with three significant digits, whole numbers whole, and no exponent for thousands."""
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else str(value)
    whole = float(value).is_integer() or abs(value) >= 999.5  # 999.6 has three digits as 1000
    return f"{value:.0f}" if whole and abs(value) < 1e9 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """Format seconds as `45 s`, `3 min 20 s` or `2 h 05 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"

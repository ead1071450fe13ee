"""Limits of vLLM, checked by configuration, data and servers before an engine starts."""

from __future__ import annotations

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0  # where responses are sampled; 0 is greedy

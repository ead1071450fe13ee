"""Limits of vLLM that configuration, data and servers check before an engine does."""

from __future__ import annotations

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0  # where responses are sampled; 0 is greedy

"""Estimate the memory and time of a run before it starts, and simulate many steps. The arithmetic needs no torch."""

"""Compute the sequences of a packed row: layout, attention, and forward pass."""

"""Compute the sequences of a packed row: its layout, its attention, and the forward pass."""

"""Everything that a run leaves behind: metrics, samples, errors, timeline and checkpoints, and the terminal's display.

This package runs in the driver, on scalars and text. It must not hold a model or a token tensor.
"""

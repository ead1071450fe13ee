"""What a run leaves behind: metrics, samples, errors, timeline, checkpoints, and what the terminal shows meanwhile.

Everything here runs in the driver, on scalars and text. It must not hold a model or a token tensor.
"""

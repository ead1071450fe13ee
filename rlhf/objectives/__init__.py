"""Define the equations of post-training, each once: tensors and floats in, tensors out.

rlhf.algorithms and the workers call them on local tokens. Nothing here knows a config object, a device, a process group
or a logger. Every module states the paper and the equation.
"""

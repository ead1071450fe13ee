"""The equations of post-training, each once: tensors and floats in, tensors out.

Called by rlhf.algorithms and by the workers that hold the tokens. Nothing here knows a config object, a device,
a process group or a logger. Every module states the paper and equation it implements.
"""

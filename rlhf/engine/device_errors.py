"""Tell the errors after which a process cannot use its GPU any more from those that it survives.

After such an error every later call to CUDA fails too, so only a new process can go on. Running out of memory is no
such error: the process could go on, and its successor would need as much.
"""

from __future__ import annotations

import re

from rlhf.engine.memory import is_out_of_memory

# CUDA's runtime, its driver, kernels of Triton, cuBLAS, cuDNN and NCCL. Libraries pass such errors on by their text.
_LOST = re.compile(r"CUDA (driver )?error|Triton Error \[CUDA\]|CUBLAS_STATUS_|CUDNN_STATUS_|cuDNN error|NCCL error")


def has_lost_device(error: BaseException | None) -> bool:
    """Return whether the process of an error must be replaced, because its GPU does not obey it any more."""
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None and not is_out_of_memory(error)

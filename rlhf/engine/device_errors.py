"""Recognise errors after which a process cannot use the GPU any more.

Running out of memory does not count: the process could continue, and a successor would need as much.
"""

from __future__ import annotations

import re

from rlhf.engine.memory import is_out_of_memory

# CUDA's runtime, its driver, kernels of Triton, cuBLAS, cuDNN and NCCL. Libraries pass such errors on by their text.
_LOST = re.compile(r"CUDA (driver )?error|Triton Error \[CUDA\]|CUBLAS_STATUS_|CUDNN_STATUS_|cuDNN error|NCCL error")


def has_lost_device(error: BaseException | None) -> bool:
    """Return whether an error ends all use of the GPU by the raising process."""
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None and not is_out_of_memory(error)

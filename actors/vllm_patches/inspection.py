"""Hide packages for CUDA in the process in which vLLM inspects the class of a model.

vLLM starts this process for a model seen for the first time on a machine. The process imports transformers, not rlhf,
so a build of torchaudio for CUDA beside a CPU build of torch would end the start of the engine.
"""

from __future__ import annotations

import sys

from rlhf.cuda_builds import broken_cuda_builds

MODULE = "vllm.model_executor.models.registry"


def hide_cuda_builds_from_inspection() -> None:
    """Have the process of vLLM begin without the packages that rlhf hides from this process."""
    hidden = list(broken_cuda_builds())
    if hidden:
        from vllm.model_executor.models import registry

        hide = f"import runpy, sys; sys.modules.update(dict.fromkeys({hidden!r}))"
        code = f"{hide}; runpy.run_module({MODULE!r}, run_name='__main__', alter_sys=True)"
        registry._SUBPROCESS_COMMAND = [sys.executable, "-c", code]

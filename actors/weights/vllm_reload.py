"""Loading published weights into a running vLLM model: what all receiving ends share.

vLLM packs weights for its kernels after loading, so they cannot just be copied into the parameters: `initialize_
layerwise_reload` puts each layer back into its loadable form, and it is packed again once its weights have come.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

InitInfo = TypeVar("InitInfo", bound=WeightTransferInitInfo)
UpdateInfo = TypeVar("UpdateInfo", bound=WeightTransferUpdateInfo)


class ReloadEngine(WeightTransferEngine[InitInfo, UpdateInfo], Generic[InitInfo, UpdateInfo]):  # type: ignore[misc]
    """A receiving end that loads whole, named weights. Its worker stands still between start and finish."""

    checksum = ""  # of the bytes last received

    def start_weight_update(self) -> None:
        """Put the model into its loadable form."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive and load. The base class waits for an accelerator, which a CPU has not."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def load(self, named_weights: Iterator[tuple[str, Tensor]]) -> None:
        """Give the weights to the model, which fuses q, k, v and gate, up."""
        self.model.load_weights(named_weights)

    def finish_weight_update(self) -> None:
        """Pack the model again, the tied head included."""
        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_heads(self.model)


def repack_tied_heads(model: torch.nn.Module) -> None:
    """On a CPU the head has packed weights of its own. A tied head is not loaded, so it keeps the old embedding's."""
    for module in model.modules():
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)

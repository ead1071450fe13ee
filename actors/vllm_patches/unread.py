"""Record the weights of a model's files that vLLM does not read while loading.

vLLM's loaders pass over many unknown weights, often without an error. A weight counts as read once an operation has
read the values, or the model holds the weight's memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

TRANSFORMERS = "vllm.model_executor.models.transformers"  # for models that vLLM does not have itself


class UnreadWeights(TorchDispatchMode):
    """The weights whose values no operation inside has read: only views have been taken."""

    def __init__(self) -> None:
        super().__init__()
        self._noted: dict[int, tuple[StorageWeakRef, str]] = {}  # by storage, whose address a reference keeps unique

    @property
    def names(self) -> set[str]:
        return {name for _, name in self._noted.values()}

    def note(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights, and note each as unread before."""
        for name, weight in weights:
            reference = StorageWeakRef(weight.untyped_storage())
            self._noted[reference.cdata] = (reference, name)
            yield name, weight

    def mark_read(self, values: Iterable[Any]) -> None:
        """Forget the weights that share memory with any of the values."""
        for value in values:
            if isinstance(value, Tensor):
                self._noted.pop(value.untyped_storage()._cdata, None)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and forget the weights read by the operation."""
        if not operation.is_view:
            self.mark_read(tree_leaves((args, kwargs)))
        return operation(*args, **(kwargs or {}))


def note_unread_weights() -> None:
    """Have vLLM's workers keep the names of unread weights as `unread_weights` of each model loaded from files."""
    load_all, weights_of = DefaultModelLoader.load_weights, DefaultModelLoader.get_all_weights

    def load(loader: Any, model: Any, config: Any) -> None:
        with UnreadWeights() as loader.unread:
            load_all(loader, model, config)
        loader.unread.mark_read((*model.parameters(), *model.buffers()))
        model.unread_weights = frozenset(loader.unread.names)

    def noted_weights(loader: Any, config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        unread: UnreadWeights = loader.unread
        return unread.note(weights_of(loader, config, model))

    DefaultModelLoader.load_weights, DefaultModelLoader.get_all_weights = load, noted_weights


def unread_weights(model: Any) -> frozenset[str]:
    """Return the names of a loaded model's unread weights. vLLM loads classes of transformers strictly: none."""
    if type(model).__module__.startswith(TRANSFORMERS):
        return frozenset()
    names: frozenset[str] = getattr(model, "unread_weights", frozenset())  # other loaders note nothing
    return names

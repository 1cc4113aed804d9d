"""The inputs of layers, read from the graph's nodes where nothing has to be computed for that."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradkern.gradients.activations.layers import Layer
from gradkern.gradients.engine import raise_explained

_FREE = frozenset(("aten::detach", "aten::alias", "aten::_to_copy"))
"""The operators that reading runs: torch detaches some tensors, and offloaded ones are copied back."""


class _Recomputes(Exception):
    """Reading a tensor computes it anew."""


class _NoComputation(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name not in _FREE:
            raise _Recomputes
        return func(*args, **(kwargs or {}))


def read(layers: Iterable[Layer], losses: Sequence[Tensor]) -> list[Tensor]:
    """Return what went into each layer.

    Raises:
        ValueError: activation checkpointing would compute it anew, the whole block for each layer; or a graph has been
            freed.
    """
    try:
        with _NoComputation():
            return [layer.read() for layer in layers]
    except _Recomputes:
        raise ValueError(
            "through='activations' needs what went into each layer, and activation checkpointing would compute its "
            "whole block anew for each layer: leave checkpointing out, or give through='rows'"
        ) from None
    except RuntimeError as error:
        raise_explained("one of losses", losses, error)
        raise

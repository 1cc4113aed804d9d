"""The parameters of a step: checked, named, numbered into groups, and shared between tasks or not."""

import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradkern.ops.dtypes import DTYPES

Params = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
Groups = str | Callable[[str], Hashable]


@dataclass(frozen=True)
class Parameters:
    """All given parameters. Frozen ones are included, so that freezing never renumbers a group.

    Attributes:
        tensors: n leaf tensors.
        names: their names, or None if the user gave tensors only.
        argument: the name of the argument that held them.
    """

    tensors: list[Tensor]
    names: list[str] | None
    argument: str

    def name(self, k: int) -> str:
        """Return the name of parameter k for error messages."""
        return f"{self.argument}[{k}]" if self.names is None else repr(self.names[k])


def parameters(params: Params) -> Parameters:
    """Read ``params`` in any of its forms and check every tensor.

    Raises:
        TypeError: ``params`` is not a Module, tensors or (name, tensor) pairs; a tensor has a dtype that gradient
            surgery does not support, or is a DTensor.
        ValueError: ``params`` is empty, or has a tensor twice, a tensor that is not a leaf, trainable tensors on
            several devices, or an expanded ``.grad``.
    """
    given = read("params", params)
    if not given.tensors:
        raise ValueError("params is empty")
    seen: dict[Tensor, int] = {}
    device: torch.device | None = None
    for k, p in enumerate(given.tensors):
        if seen.setdefault(p, k) != k:
            raise ValueError(f"params holds the same tensor twice: {given.name(seen[p])} and {given.name(k)}")
        if not p.requires_grad:
            continue
        _check(given, k, p)
        if device is None:
            device = p.device
        elif p.device != device:
            raise ValueError(f"params must be on one device; {given.name(k)} is on {p.device}, others on {device}")
    if device is None:
        raise ValueError(f"params holds no tensor that requires grad, of {len(given.tensors)} given")
    return given


def read(argument: str, params: Params) -> Parameters:
    """Read tensors and names from a Module, tensors or (name, tensor) pairs."""
    if isinstance(params, nn.Module):
        params = params.named_parameters()
    if isinstance(params, Tensor | str) or not isinstance(params, Iterable):
        raise TypeError(f"{argument} must be a Module, tensors or (name, tensor) pairs, got {type(params).__name__}")
    entries: list[Any] = list(params)
    pairs = [isinstance(e, tuple) and len(e) == 2 and isinstance(e[0], str) for e in entries]
    tensors = [e[1] if pair else e for e, pair in zip(entries, pairs, strict=True)]
    for k, p in enumerate(tensors):
        if not isinstance(p, Tensor):
            raise TypeError(f"{argument}[{k}] must be a tensor or a (name, tensor) pair, got {type(p).__name__}")
    if any(pairs) and not all(pairs):
        raise TypeError(
            f"{argument} mixes tensors with (name, tensor) pairs; {argument}[{pairs.index(False)}] is unnamed"
        )
    return Parameters(tensors, [e[0] for e in entries] if entries and pairs[0] else None, argument)


def subset(shared: Params, given: Parameters) -> set[Tensor]:
    """Return the tensors of ``shared``, which has any form of ``params``, as a set.

    Raises:
        TypeError, ValueError: ``shared`` has no form of ``params``, or holds a tensor that is not in ``given``.
    """
    chosen = read("shared", shared)
    known = set(given.tensors)
    for k, p in enumerate(chosen.tensors):
        if p not in known:
            raise ValueError(f"shared must be some of params; {chosen.name(k)} of shape {tuple(p.shape)} is not")
    return set(chosen.tensors)


def _check(given: Parameters, k: int, p: Tensor) -> None:
    if p.dtype not in DTYPES:
        raise TypeError(f"params must be float32, float64, bfloat16 or float16; {given.name(k)} is {p.dtype}")
    if not p.is_leaf:
        raise ValueError(f"params must be leaf tensors, whose .grad can be set; {given.name(k)} is computed")
    if p.grad is not None and not p.grad.is_sparse and _has_overlap(p.grad):
        raise ValueError(f".grad of {given.name(k)} in params cannot be added to in place: strides {p.grad.stride()}")
    dtensor = sys.modules.get("torch.distributed.tensor")  # no DTensor exists before this is imported
    if dtensor is not None and isinstance(p, dtensor.DTensor):
        raise TypeError(
            f"params must not be DTensors; {given.name(k)} is one: the dot products of its shards would be "
            "combined on each rank alone, and the ranks would drift apart"
        )


def _has_overlap(g: Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(g.stride(), g.shape, strict=True))


def segments(given: Parameters, groups: Groups) -> tuple[list[int], int]:
    """Return the group of each parameter, numbered by first appearance, and the number of groups.

    Raises:
        TypeError: ``groups`` is neither a string nor a function.
        ValueError: ``groups`` is an unknown string, or needs names that ``given`` does not have.
    """
    n = len(given.tensors)
    if not isinstance(groups, str) and not callable(groups):
        raise TypeError(f"groups must be a string or a function of the name, got {type(groups).__name__}")
    if groups == "model":
        return [0] * n, 1
    if groups == "parameter":
        return list(range(n)), n
    if isinstance(groups, str) and groups != "module":
        raise ValueError(f"groups must be 'model', 'parameter', 'module' or a function of the name, got {groups!r}")
    if given.names is None:
        raise ValueError(f"groups={groups!r} needs names: give params as a Module or as (name, tensor) pairs")
    group_of = _owning_module if groups == "module" else groups
    assert callable(group_of)
    numbers: dict[Hashable, int] = {}
    numbered = []
    for name in given.names:
        group = group_of(name)
        if not isinstance(group, Hashable) or isinstance(group, Tensor):
            raise TypeError(f"groups must give hashable values that are not tensors; gave {group!r} for {name!r}")
        numbered.append(numbers.setdefault(group, len(numbers)))
    return numbered, len(numbers)


def _owning_module(name: str) -> str:
    return name.rpartition(".")[0]


@dataclass(frozen=True)
class Targets:
    """The trainable parameters of a step, their groups, and the rule for which of them are shared.

    Attributes:
        given: all parameters given, frozen ones too.
        tensors: n parameters that require grad.
        places: the index of each among all given parameters.
        segments: the group of each.
        n_segments: S, the number of groups of all given parameters.
        named: the shared parameters, if the user names them; None if those that two tasks reach are shared.
    """

    given: list[Tensor]
    tensors: list[Tensor]
    places: list[int]
    segments: list[int]
    n_segments: int
    named: set[Tensor] | None

    @classmethod
    def of(cls, params: Params, groups: Groups, shared: Params | None) -> "Targets":
        """Read and check the user's arguments.

        Raises:
            TypeError, ValueError: as :func:`parameters`, :func:`segments` and :func:`subset`.
        """
        given = parameters(params)
        numbers, n_segments = segments(given, groups)
        named = None if shared is None else subset(shared, given)
        places = [k for k, p in enumerate(given.tensors) if p.requires_grad]
        tensors = [given.tensors[k] for k in places]
        return cls(given.tensors, tensors, places, [numbers[k] for k in places], n_segments, named)

    @property
    def device(self) -> torch.device:
        """The device of all parameters."""
        return self.tensors[0].device

    def are_shared(self, grads: Sequence[Sequence[Tensor | None]]) -> list[bool]:
        """Return whether each parameter is shared: named, or if none are named, reached by at least two tasks.

        Args:
            grads: T rows of n gradients, None where a task does not reach a parameter.
        """
        if self.named is not None:
            return [p in self.named for p in self.tensors]
        return [sum(g is not None for g in column) > 1 for column in zip(*grads, strict=True)]

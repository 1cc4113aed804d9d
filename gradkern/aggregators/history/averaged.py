"""The base class of methods on running means of the task gradients.

The means are T rows of P numbers, one matrix for each dtype of the gradients. A step computes new means in new memory,
and they take the old ones' place. So a step that raises puts the old ones back, and nothing has to be copied for that.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradkern.aggregators.base import has_numbers
from gradkern.aggregators.task_state import TaskState
from gradkern.arguments import integer, shown, tensor
from gradkern.ops import combine, gramian
from gradkern.ops.capture import capturing, first_use, keep
from gradkern.ops.dtypes import DTYPES, arithmetic_dtype
from gradkern.ops.undo import PutBack, Undo

ALIGNED = 64
"""Each parameter's part of a row starts at a multiple of so many numbers, so that kernels load whole vectors."""
MEANS = "means_"
NAMES = {f"{MEANS}{str(dtype).removeprefix('torch.')}": dtype for dtype in DTYPES}
"""The buffers' names, and the dtype of each."""
_NAMES = {dtype: name for name, dtype in NAMES.items()}

Sizes = dict[str, dict[int, int]]
"""By the name of a buffer, the numbers of elements of the parameters in it, by their places, in order."""


class Part(NamedTuple):
    """A parameter's part of the means: its place among the parameters, its number of elements, its dtype."""

    place: int
    numel: int
    dtype: torch.dtype


class Averaged(TaskState):
    """A method on running means of the task gradients, m_i ← (1 - r_i) m_i + r_i s_i g_i, from 0.

    The means are state: each call is a step, and ``state_dict`` contains them. They take the place of the gradients of
    shared parameters, and unshared ones get their gradients as they are. The memory is T numbers for each number of the
    shared parameters, of their gradients' dtype, and twice as much within a step. Parameters are known by their places
    among those given, so give the same ones in every step; some may be added behind them.

    A step in which a gradient is not finite changes no mean, and its Gramian and weights are not finite. An absent
    task's mean waits. If a gradient scaler scales the losses, the means are of scaled gradients, and of several scales
    for some steps after the scale has changed.

    Attributes:
        steps: (T,) float64, the number of steps of each task; None before the first step.
        sizes: the parameters in each matrix of means, and their numbers of elements.
    """

    uses_memory = False
    averages_rows = True
    recalls_absent = False
    """Whether an absent task takes part with its mean."""
    steps: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", None)
        self.sizes: Sizes = {}

    @abstractmethod
    def rates(self, steps: Tensor) -> Tensor:
        """Return r_i (T,), the share by which a task's step moves its mean.

        Args:
            steps: (T,) float64, the number of each task's steps so far, this one included.
        """

    def scales(self, losses: Tensor) -> Tensor | None:
        """Return s_i (T,), the factors of the gradients, from the losses (T,); None for ones."""
        return None

    def knows(self, place: int) -> bool:
        """Return whether there are means of the parameter at a place."""
        return any(place in of_dtype for of_dtype in self.sizes.values())

    def rows_for(self, parts: Iterable[Part], T: int, device: torch.device) -> dict[torch.dtype, Tensor]:
        """Return zeros (T, P) for each dtype, for the gradients of parameters of which means are kept, or will be.

        Raises:
            ValueError: a parameter has another size or dtype than before, or there is another number of tasks.
        """
        if self.steps is not None and len(self.steps) != T:
            raise ValueError(
                f"the means of {type(self).__name__} are of {len(self.steps)} tasks, and this step has {T}: a task "
                f"that is absent is None among the losses. A new {type(self).__name__} starts anew"
            )
        sizes = {name: dict(of_dtype) for name, of_dtype in self.sizes.items()}
        for place, numel, dtype in parts:
            before = next((name for name, of_dtype in sizes.items() if place in of_dtype), _NAMES[dtype])
            known = sizes.setdefault(before, {}).setdefault(place, numel)
            if known != numel or before != _NAMES[dtype]:
                raise ValueError(
                    f"the means of {type(self).__name__} for parameter {place} are {known} numbers in {before}, and "
                    f"this step's gradient is {numel} numbers, {dtype}. A new {type(self).__name__} starts anew"
                )
        if capturing(device) and sizes != self.sizes:
            raise first_use("to make the means")
        self.sizes = sizes
        return {
            NAMES[name]: torch.zeros(T, width(of_dtype), dtype=NAMES[name], device=device)
            for name, of_dtype in sizes.items()
        }

    def starts(self, dtype: torch.dtype) -> dict[int, int]:
        """Return where each parameter's part of a row begins, by the parameter's place."""
        starts, end = {}, 0
        for place, numel in self.sizes[_NAMES[dtype]].items():
            starts[place] = end
            end += aligned(numel)
        return starts

    def move(
        self,
        rows: Mapping[torch.dtype, Tensor],
        present: Tensor | None,
        losses: Tensor | None,
        agreed: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[dict[torch.dtype, Tensor], Tensor]:
        """Move the means by a step's gradients, and return them, and whether the step is finite, ().

        Args:
            rows: the gradients, as :meth:`rows_for` returns their memory. They are overwritten unless autograd records
                them.
            present: (T,) bool, the tasks with gradients in this step; None for all.
            losses: (T,); None on a matrix, whose rows are scaled already.
            agreed: returns from whether this rank's parts of the rows are finite, (), whether those of all ranks are;
                None if the rows are whole.
        """
        first = next(iter(rows.values()))
        steps = torch.zeros(len(first), dtype=torch.float64, device=first.device)
        known = self.steps is not None and has_numbers(first)
        if known:
            assert self.steps is not None
            steps = self.steps.to(first.device)
        there = torch.ones_like(steps, dtype=torch.bool) if present is None else present
        scale = None if losses is None else self.scales(losses)
        scale = torch.ones_like(steps) if scale is None else scale.double()
        # A scale may be too much for a dtype; the largest entry of each row tells it.
        tops = [_largest(X.detach()).double() * scale for X in rows.values()]
        finite = (torch.stack([*tops, scale]).isfinite() | ~there).all()
        finite = finite if agreed is None else agreed(finite)
        moves = there & finite
        steps = steps + moves
        rate = torch.where(moves, self.rates(steps), 0.0)
        factor = torch.where(moves, rate * scale, 0.0)
        means = {dtype: self._mean(X, dtype, rate, factor) for dtype, X in rows.items()}
        if has_numbers(first):
            self._set("steps", steps)
            for dtype, mean in means.items():
                self._set(_NAMES[dtype], mean.detach())
        return means, finite

    def _mean(self, X: Tensor, dtype: torch.dtype, rate: Tensor, factor: Tensor) -> Tensor:
        """Return the new means, in the memory of the gradients X unless autograd records them."""
        old = self._buffers.get(_NAMES[dtype])
        kind = arithmetic_dtype(dtype)
        factor, kept = factor.to(kind).unsqueeze(1), (1 - rate).to(kind).unsqueeze(1)
        recorded = X.requires_grad
        mean = X.nan_to_num(0.0, 0.0, 0.0) * factor if recorded else X.nan_to_num_(0.0, 0.0, 0.0).mul_(factor)
        if old is None or not has_numbers(X):
            return mean
        old = old.to(X.device)
        if old.shape != X.shape:  # parameters have been added behind those before
            old = torch.nn.functional.pad(old, (0, X.shape[1] - old.shape[1]))
        return torch.addcmul(mean, old, kept) if recorded else mean.addcmul_(old, kept)

    def _set(self, name: str, value: Tensor) -> None:
        """Keep a tensor for the next step; a captured CUDA graph writes it in place."""
        current = self._buffers.get(name)
        with torch.inference_mode(False):  # a later step outside of it must be able to change them
            if capturing(value.device) and current is not None:
                keep(current)
                current.copy_(value)
            elif name in self._buffers:
                self._buffers[name] = value.clone() if value.is_inference() else value
            else:
                self.register_buffer(name, value.clone() if value.is_inference() else value)

    def _aggregate(self, J: Tensor, offsets: Tensor | None, losses: Tensor | None, out: Tensor | None) -> Tensor:
        with Undo(self.snapshot()):  # the offsets, say, may be wrong
            return self._aggregated(J, offsets, out)

    def _aggregated(self, J: Tensor, offsets: Tensor | None, out: Tensor | None) -> Tensor:
        T, P = J.shape
        memory = self.rows_for([Part(0, P, J.dtype)], T, J.device)[J.dtype]
        recorded = J.requires_grad and torch.is_grad_enabled()
        rows = torch.nn.functional.pad(J, (0, memory.shape[1] - P)) if recorded else memory
        if not recorded:
            memory[:, :P] = J.detach()
        means, finite = self.move({J.dtype: rows}, None, None)
        mean = means[J.dtype][:, :P]
        w = self.weights(gramian(mean.detach(), offsets))
        return combine(mean, torch.where(finite, w, torch.nan), offsets, out=out)

    def snapshot(self) -> PutBack:
        """Return a function that puts the state back; nothing is copied, because nothing is written into the means."""
        buffers, sizes = dict(self._buffers), self.sizes

        def put_back() -> None:
            self._buffers.clear()
            self._buffers.update(buffers)
            self.sizes = sizes

        return put_back

    def get_extra_state(self) -> dict[str, list[list[int]]]:  # type: ignore[override]
        """Return which parameters' means are in each matrix: their places, and their numbers of elements."""
        return {name: [[place, numel] for place, numel in of_dtype.items()] for name, of_dtype in self.sizes.items()}

    def set_extra_state(self, state: Any) -> None:
        """Do nothing: the means are loaded with it."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        sizes = checked(state_dict.get(f"{prefix}_extra_state"))
        steps = state_dict.get(f"{prefix}steps")
        tasks = None if steps is None else len(tensor("steps in state_dict", steps, (torch.float64,)))
        if (tasks is None) != (not sizes):
            raise ValueError(f"steps in state_dict must go with the means of {list(sizes)}, got {shown(steps)}")
        shapes = {"steps": (tasks,)} | {name: (tasks, width(of_dtype)) for name, of_dtype in sizes.items()}
        for name in [name for name in self._buffers if name.startswith(MEANS)]:
            del self._buffers[name]
        self._buffers["steps"] = None
        for name, shape in shapes.items() if tasks is not None else ():
            loaded = tensor(f"{name} in state_dict", state_dict.get(f"{prefix}{name}"))
            dtype = NAMES.get(name, torch.float64)
            if loaded.shape != shape or loaded.dtype != dtype:
                raise ValueError(
                    f"{name} in state_dict must be {dtype} {shape}, got {loaded.dtype} {tuple(loaded.shape)}"
                )
            self._buffers.pop(name, None)
            self.register_buffer(name, torch.empty_like(loaded))
        self.sizes = sizes
        super()._load_from_state_dict(state_dict, prefix, *args)


def width(of_dtype: Mapping[int, int]) -> int:
    """Return the length of a row of parameters of some sizes."""
    return sum(map(aligned, of_dtype.values()))


def aligned(numel: int) -> int:
    """Return a parameter's share of a row: its number of elements, rounded up."""
    return -(-numel // ALIGNED) * ALIGNED


def _largest(X: Tensor) -> Tensor:
    """Return the largest magnitude in each row (T,), NaN where one entry is."""
    return torch.linalg.vector_norm(X, torch.inf, 1) if X.shape[1] else X.new_zeros(len(X))


def checked(state: object) -> Sizes:
    """Return which parameters' means a ``state_dict`` holds; raise unless it says so."""
    name = "_extra_state in state_dict"
    if not isinstance(state, Mapping) or not set(state) <= set(NAMES):
        raise TypeError(f"{name} must hold sizes of means by dtype, got {shown(state)}")
    sizes: Sizes = {}
    for key, pairs in state.items():
        if not isinstance(pairs, list | tuple) or not all(isinstance(x, list | tuple) and len(x) == 2 for x in pairs):
            raise TypeError(f"{name} must hold pairs of a place and a size, got {shown(pairs)}")
        sizes[key] = {integer(f"a place in {name}", k, 0): integer(f"a size in {name}", n, 0) for k, n in pairs}
    return sizes

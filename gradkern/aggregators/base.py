"""The base class of methods: each computes the weights of the task gradients from their Gramian."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from gradkern.arguments import instance, shown, tensor
from gradkern.ops import combine, gramian
from gradkern.ops.arguments import ProjectionArguments
from gradkern.ops.matrix import readable
from gradkern.ops.out import check_out
from gradkern.ops.undo import PutBack, numbers_of, state_of

_DTYPES = (torch.float32, torch.float64)

OwnGrads = Sequence[tuple[Tensor, Tensor]]
"""Parameters of a method, each with its gradient."""


@dataclass(frozen=True)
class Solution:
    """The weights of a step, and the method's other results; see :class:`gradkern.SurgeryInfo`.

    Attributes:
        unshared: (T,) float64, the weights of parameters that are not under surgery; None for ones.
        own: the gradients of the method's own parameters, if the user's optimizer trains them.
    """

    weights: Tensor
    targets: Tensor | None = None
    attention: Tensor | None = None
    unshared: Tensor | None = None
    own: OwnGrads = ()


@dataclass(frozen=True)
class Program:
    """A method in the form that the operator ``surgery`` takes, which does a step's whole surgery at once.

    Attributes:
        projection: the method's arguments.
        solution: makes a :class:`Solution` from the Gramians (S, T, T) and weights (S, T) that the operator returns.
    """

    projection: ProjectionArguments
    solution: Callable[[Tensor, Tensor], Solution]


class Aggregator(nn.Module, ABC):
    """A method. Call ``aggregator(J)`` on a matrix, ``aggregator.weights(M)`` on a Gramian, :func:`backward` on losses.

    Args:
        generator: the source of random choices; None for the default generator of the Gramian's device. Its state is
            part of ``state_dict``.
    """

    needs_gramian = True
    """Whether the weights depend on the Gramian of the task gradients."""
    needs_losses = False
    """Whether ``solution`` takes the losses."""
    needs_eps = False
    """Whether ``solution`` takes the precision of each group's rows."""
    needs_present = False
    """Whether a gradient of zero differs from an absent task's, so that ``solution`` is told which tasks are absent."""
    needs_second = False
    """Whether ``solution`` takes ``cross``, the dot products with a second batch's gradients."""
    needs_entries = False
    """Whether it looks at entries of the task gradients, and not only at their Gramian."""
    uses_memory = True
    """Whether remembered gradients of absent tasks take part in a step; else absent tasks are left out of it."""
    required: tuple[int, ...] = ()
    """The numbers of the tasks that must be present in every step."""
    averages_rows = False
    """Whether running means of the task gradients take their place, which :class:`Averaged` keeps."""
    is_trained = False
    """Whether the user's optimizer trains its parameters, by the gradients in ``Solution.own``."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if generator is not None:
            instance("generator", generator, torch.Generator, "a torch.Generator or None")
        self.generator = generator

    @abstractmethod
    def weights(self, M: Tensor) -> Tensor:
        """Return the weights of the task gradients in the update.

        Args:
            M: (..., T, T), Gramians; float32 or float64. Leading dimensions are independent problems.

        Returns:
            (..., T), of M's dtype and on its device. No gradient flows through them.

        Raises:
            TypeError, ValueError: ``M`` is not as described above, or does not fit the method's arguments.
        """

    def solution(self, M: Tensor, present: Tensor | None, losses: Tensor | None = None) -> Solution:
        """Return the solution of a step in which some tasks may be absent; :func:`gradkern.backward` calls it.

        Args:
            M: (S, T, T), as for :meth:`weights`.
            present: (T,) bool on M's device, true for the tasks whose gradients come from this step. The others' are
                remembered: the update sums the modified gradients of present tasks only. None if all are present.
            losses: (T,) on M's device, NaN for absent tasks; None for a method that does not need them.
        """
        w = self.weights(M)
        return Solution(w if present is None else torch.where(present, w, 0.0))

    def program(self, M: Tensor) -> Program | None:
        """Return the method in the form that the operator ``surgery`` takes; None if the operator does not support it.

        Args:
            M: (S, T, T), uninitialized; it gives the shape, dtype and device of the Gramians.
        """
        return None

    def forward(
        self,
        J: Tensor,
        offsets: Tensor | None = None,
        *,
        losses: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Return the update wᵀ J of a matrix of task gradients. Each segment has its own weights.

        Args:
            J: (T, P), as for :func:`gradkern.gramian`.
            offsets: None or (S + 1,), as for :func:`gradkern.gramian`.
            losses: the tasks' losses, as for ``weights`` of a method that needs them; others ignore it.
            out: memory for the result, as for :func:`gradkern.combine`, or None.

        Returns:
            (P,) in J's dtype, ``out`` itself if that is given. Differentiable in J with the weights held constant.

        Raises:
            TypeError, ValueError: an argument is not as described above, or does not fit the method's arguments.
                Nothing has been written then, and the method's state is as before.
        """
        X = readable(J, offsets)
        check_out(out, J)
        return self._aggregate(X, offsets, losses, out)

    def _aggregate(self, J: Tensor, offsets: Tensor | None, losses: Tensor | None, out: Tensor | None) -> Tensor:
        """Return the result of :meth:`forward`; J and ``out`` are checked, and J's columns are of unit stride."""
        given: dict[str, Any] = {"losses": losses} if self.needs_losses else {}
        return combine(J, self.weights(gramian(J.detach(), offsets), **given), offsets, out=out)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as every Module does. A copy is loaded first, so that an error leaves this method unchanged."""
        if not isinstance(state_dict, Mapping) or not all(isinstance(key, str) for key in state_dict):
            raise TypeError(f"state_dict must be a dictionary of named entries, got {shown(state_dict)}")
        nn.Module.load_state_dict(copy.deepcopy(self), state_dict, strict, assign)
        return super().load_state_dict(state_dict, strict, assign)

    def get_extra_state(self) -> Tensor | None:
        """Return the state of the method's own generator, None if it has none."""
        return None if self.generator is None else self.generator.get_state()

    def set_extra_state(self, state: Any) -> None:
        """Load the result of :meth:`get_extra_state`."""
        if state is None:
            return
        if self.generator is None:
            raise ValueError(f"generator is None in {self!r}, but the state to load holds a generator's state")
        self.generator.set_state(tensor("the generator's state", state, (torch.uint8,)).cpu())

    def snapshot(self) -> PutBack:
        """Return a function that puts the method's state back as it is when this is called.

        A step that raises calls it. The state is the method's parameters, buffers and generator; a method with more
        extends it.
        """
        holders = [(state, dict(state)) for state in self._state_dicts()]
        kept = [numbers_of(x) for _, state in holders for x in state.values() if x is not None]
        if self.generator is not None:
            kept.append(state_of(self.generator))

        def put_back() -> None:
            for state, before in holders:
                state.clear()
                state.update(before)
            for put_numbers_back in kept:
                put_numbers_back()

        return put_back

    def _state_dicts(self) -> Iterator[dict[str, Any]]:
        """Yield the dictionaries that hold the tensors of the method's state."""
        for module in self.modules() if self._modules else (self,):
            if module._parameters:
                yield module._parameters
            if module._buffers:
                yield module._buffers


class PerDevice:
    """Host numbers as a tensor on any device. Each GPU gets one copy, because every copy waits for it."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def on(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the numbers as a tensor of ``dtype`` on ``device``."""
        if device.type == "cpu" or device.type == "meta":
            return torch.tensor(self.values, dtype=dtype, device=device)
        if (device, dtype) not in self._copies:
            with torch.inference_mode(False):  # autograd cannot save inference tensors
                self._copies[device, dtype] = torch.tensor(self.values, dtype=dtype, device=device)
        return self._copies[device, dtype]


def has_numbers(M: Tensor) -> bool:
    """Return whether ``M`` has numbers that a method's state can keep; fake and meta tensors have none."""
    return not (M.is_meta or isinstance(M, FakeTensor))


def all_finite(M: Tensor, present: Tensor | None = None) -> Tensor:
    """Return (S,) bool: whether a Gramian (S, T, T) is finite among the present tasks, or all."""
    finite = M.isfinite()
    if present is not None:
        finite = finite | ~(present.unsqueeze(-1) & present)
    return finite.flatten(1).all(1)


def check_gramian(M: Tensor) -> None:
    """Raise unless ``M`` is dense, (..., T, T) with T >= 1, float32 or float64, as Gramians are."""
    if type(M) is not Tensor or M.dtype not in _DTYPES or M.layout is not torch.strided or M.is_nested:
        tensor("M", M, _DTYPES)
    shape = M.shape
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] == 0:
        raise ValueError(f"M must have shape (..., T, T) with T >= 1, got {tuple(shape)}")


def in_dtype(w: Tensor, M: Tensor) -> Tensor:
    """Return weights in M's dtype, themselves if they are."""
    return w if w.dtype is M.dtype else w.to(M.dtype)

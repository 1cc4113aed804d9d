"""Numbers of each task in each group that a method keeps from step to step."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from gradkern.aggregators.base import Aggregator, has_numbers
from gradkern.arguments import tensor
from gradkern.ops.capture import capturing, first_use, keep
from gradkern.ops.dtypes import DTYPES


class TaskState(Aggregator):
    """A method that keeps buffers (S, T), float64, one number for each group and task; None before the first step.

    Attributes:
        kept: the names of the buffers.
    """

    needs_present = True

    kept: ClassVar[tuple[str, ...]] = ()

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__(generator)
        for name in self.kept:
            self.register_buffer(name, None)

    def _kept_for(self, name: str, M: Tensor, start: float) -> Tensor:
        """Return the numbers for M (S, T, T), on its device, with ``start`` where there are none yet.

        Raises:
            ValueError: they are of another number of tasks, or of more groups.
            RuntimeError: a CUDA graph is being captured, and they are not there yet.
        """
        S, T = M.shape[:-1]
        current: Tensor | None = self._buffers[name]
        fits = current is not None and current.shape == (S, T) and current.device == M.device
        if capturing(M.device):
            if not fits:
                raise first_use(f"to make {name} of {type(self).__name__}")  # each replay would reset them
            keep(current)  # type: ignore[arg-type]  # it is there
        if current is None or not has_numbers(M):
            return torch.full((S, T), start, dtype=torch.float64, device=M.device)
        if fits:
            return current
        if current.shape[-1] != T or len(current) > S:
            raise ValueError(
                f"{name} of {type(self).__name__} is of {current.shape[-1]} tasks in {len(current)} group(s), and this "
                f"step has {T} tasks in {S} group(s): groups may be added, and a task that is absent is None among "
                f"the losses. A new {type(self).__name__} starts anew"
            )
        return torch.cat((current.to(M.device), current.new_full((S - len(current), T), start, device=M.device)))

    def _keep(self, name: str, M: Tensor, numbers: Tensor) -> None:
        """Keep numbers for the next step, unless M has none. A captured CUDA graph writes them in place.

        Args:
            name: the name of the buffer.
            M: the Gramian of the step.
            numbers: (S, T), in memory of their own.
        """
        if not has_numbers(M):
            return
        current = self._buffers[name]
        if capturing(M.device) and current is not None:
            with torch.inference_mode(False):
                current.copy_(numbers)
        elif numbers.is_inference():
            with torch.inference_mode(False):  # a later step outside of it must be able to change them
                self._buffers[name] = numbers.clone()
        else:
            self._buffers[name] = numbers

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move the numbers between devices, but keep their dtype: a running mean needs the digits."""
        own = {name: numbers for name, numbers in self._buffers.items() if numbers is not None}
        self._buffers.update(dict.fromkeys(own))
        super()._apply(fn, recurse)
        self._buffers.update({name: numbers.to(fn(numbers).device) for name, numbers in own.items()})
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict = dict(state_dict)
        for name in self.kept:
            key, current = f"{prefix}{name}", self._buffers[name]
            if key in state_dict:
                loaded = self._loadable(name, state_dict[key])
                state_dict[key] = loaded
                if current is None or current.shape != loaded.shape:
                    self._buffers[name] = torch.zeros_like(loaded, device=None if current is None else current.device)
            elif f"{prefix}_extra_state" in state_dict:
                self._buffers[name] = None  # saved before its first step
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _loadable(self, name: str, loaded: object) -> Tensor:
        """Return numbers from a ``state_dict`` in float64; raise unless they are of this method's tasks."""
        numbers = tensor(f"{name} in state_dict", loaded, DTYPES).double()
        if numbers.ndim != 2:
            raise ValueError(f"{name} in state_dict must be of shape (S, T), got {tuple(numbers.shape)}")
        current = self._buffers[name]
        if current is not None and current.shape[-1] != numbers.shape[-1]:
            raise ValueError(
                f"{name} in state_dict must be of {current.shape[-1]} tasks as this method is, got {numbers.shape[-1]}"
            )
        return numbers

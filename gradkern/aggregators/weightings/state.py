"""The state of weightings: numbers in float64 on the steps' device, moved by finite steps only."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from gradkern.aggregators.base import has_numbers
from gradkern.aggregators.weightings.scalarization import Scalarization
from gradkern.arguments import tensor
from gradkern.ops.capture import capturing, first_use
from gradkern.ops.dtypes import DTYPES


class StatefulWeighting(Scalarization):
    """A scalarization with one table of float64 numbers, a column for each task, in ``state_dict``.

    Each class names its rows and their first values in ``FIRST``.

    Args:
        T: the number of tasks; None if the first step tells it.
        report: as for :class:`Scalarization`.

    Attributes:
        table: (R, T) float64; None before the first step that tells T.
    """

    FIRST: ClassVar[dict[str, float]] = {}
    table: Tensor | None

    def __init__(self, T: int | None, report: bool = False) -> None:
        super().__init__(report)
        self.T = T
        self.register_buffer("table", None if self.T is None else self._first(self.T, torch.device("cpu")))

    def _first(self, T: int, device: torch.device) -> Tensor:
        with torch.inference_mode(False):  # a later step outside of it must be able to change it
            columns = [torch.full((T,), x, dtype=torch.float64, device=device) for x in self.FIRST.values()]
            return torch.stack(columns)

    def _rows(self, T: int, device: torch.device) -> dict[str, Tensor]:
        """Return the table's rows by name, on a step's device; those of the first step before it.

        Raises:
            ValueError: the table is of another number of tasks.
        """
        table = self.table
        if self.T not in (None, T):
            raise ValueError(f"T is {self.T} in {self!r}, but the step has {T} tasks")
        if table is not None and table.shape[-1] != T:
            raise ValueError(
                f"{self!r} has the state of {table.shape[-1]} tasks, but the step has {T}: a task keeps its place "
                "among the losses, so pass None for one that is absent"
            )
        if table is None or table.device != device:
            if capturing(device):
                raise first_use("to make the method's state")  # each replay would reset it
            table = self._first(T, device) if table is None else table.to(device)
        return dict(zip(self.FIRST, table.unbind(), strict=True))

    def _move(self, rows: dict[str, Tensor], finite: Tensor) -> None:
        """Write new values of rows into the table, all or none of them, if they and the step are ``finite``."""
        given = next(iter(rows.values()))
        old = self._rows(len(given), given.device)
        new = torch.stack([torch.where(finite, rows.get(name, row), row) for name, row in old.items()])
        if not has_numbers(new):
            return
        if self.table is None or self.table.device != new.device:
            self.table = new
        else:
            self.table.copy_(new)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move the table between devices, but keep it float64: running sums need the digits."""
        table, self.table = self.table, None
        super()._apply(fn, recurse)
        if table is not None:
            self.table = table.to(fn(table).device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        loaded = state_dict.get(f"{prefix}table")
        if loaded is not None:
            table = tensor("table in state_dict", loaded, DTYPES).double()
            wanted = (len(self.FIRST), table.shape[-1] if self.table is None else self.table.shape[-1])
            if table.ndim != 2 or table.shape != wanted:
                raise ValueError(f"table in state_dict must be of shape {wanted}, got {tuple(table.shape)}")
            state_dict = {**state_dict, f"{prefix}table": table}
            if self.table is None:
                self.table = torch.empty_like(table)
        elif self.table is not None and f"{prefix}_extra_state" in state_dict and self.T is None:
            self.table = None  # saved before its first step
        super()._load_from_state_dict(state_dict, prefix, *args)

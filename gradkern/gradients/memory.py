"""The last gradient of each task, for steps with some of the tasks (Rhapsody on a Theme of Gradient Surgery, §3.2).

An absent task takes part with the gradient of its last step, or with zeros before its first. The present tasks'
gradients are modified against it, and the update sums only the present tasks' gradients. The gradients are kept as
autograd returned them, and not copied.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradkern.gradients.layouts import Layouts, Row
from gradkern.gradients.param_grads import readable
from gradkern.gradients.sharded import part_of, whole_grad
from gradkern.ops.undo import PutBack

Remembered = dict[Tensor, Tensor]
"""The gradients of one task by parameter; of a DTensor the part that this rank holds."""


class Memory:
    """The gradients that an optimizer remembers: one row for each of T tasks, from the first step on."""

    def __init__(self) -> None:
        self._rows: list[Remembered] = []

    @property
    def counts(self) -> list[int]:
        """The number of gradients that are remembered of each task."""
        return [len(row) for row in self._rows]

    def check(self, n_tasks: int) -> None:
        """Raise ValueError if earlier steps had another number of tasks."""
        if self._rows and len(self._rows) != n_tasks:
            raise ValueError(
                f"losses has {n_tasks} entries, and the steps remembered had {len(self._rows)}: pass None for a task "
                "that is absent"
            )

    def recall(
        self,
        present: Sequence[bool],
        grads: Sequence[Row],
        params: Sequence[Tensor],
        here: Sequence[Tensor],
        layouts: Layouts,
    ) -> list[Row]:
        """Return ``grads``, T rows over ``params``, with remembered rows in place of those of absent tasks.

        Args:
            present: for each task, whether its gradients are of this step.
            grads: this rank's parts of the rows.
            params: the parameters.
            here: this rank's part of each.
            layouts: the layouts of these parts.
        """
        known = list(grads)
        for t, row in enumerate(self._rows):
            if not present[t]:
                # The parameter's strides, dtype or device may have changed since.
                old = [None if g is None else g.to(p.device) for p in params for g in (row.get(p),)]
                known[t] = readable(old, here, layouts)
        return known

    def remember(self, present: Sequence[bool], grads: Sequence[Row], params: Sequence[Tensor]) -> None:
        """Replace the remembered rows of the present tasks by those of this step."""
        self._rows = self._rows or [{} for _ in present]
        for t, is_present in enumerate(present):
            if is_present:
                self._rows[t] = {p: _compact(g) for p, g in zip(params, grads[t], strict=True) if g is not None}

    def snapshot(self) -> PutBack:
        """Return a function that puts the rows back as they are when this is called."""
        before = list(self._rows)

        def put_back() -> None:
            self._rows = before

        return put_back

    def state_dict(self, params: Sequence[Tensor]) -> list[list[Tensor | None]]:
        """Return T rows, which hold a gradient or None for each of ``params``.

        Gradients of DTensors are put together from the parts of all ranks, so all of these must call it.
        """
        known = [[row.get(p) for p in params] for row in self._rows]
        return [[None if g is None else whole_grad(g, p) for g, p in zip(row, params, strict=True)] for row in known]

    def load_state_dict(self, state: Any, params: Sequence[Tensor]) -> None:
        """Load a :meth:`state_dict`, and move it to the parameters' devices.

        Raises:
            ValueError: ``state`` has another form, or belongs to other parameters. Nothing has changed then.
        """
        if not isinstance(state, (list, tuple)) or not all(isinstance(row, (list, tuple)) for row in state):
            raise ValueError(f"the memory to load must be lists of gradients, one for each task; got {state!r:.200}")
        loaded: list[Remembered] = []
        for t, row in enumerate(state):
            if len(row) != len(params):
                raise ValueError(f"the memory of task {t} is of {len(row)} parameters, not of {len(params)}")
            for k, (g, p) in enumerate(zip(row, params, strict=True)):
                if g is not None and not _is_gradient(g, p):
                    got = f"{g.dtype} {tuple(g.shape)}, {g.layout}" if isinstance(g, Tensor) else type(g).__name__
                    raise ValueError(f"the memory of task {t} for parameter {k} must be {_shape(p)}, got {got}")
            pairs = [(p, g.detach()) for p, g in zip(params, row, strict=True) if g is not None]
            loaded.append({p: part_of(g, p).to(p.device) for p, g in pairs})
        self._rows = loaded


def _is_gradient(g: object, p: Tensor) -> bool:
    """Return whether ``g`` could be a gradient of ``p``: floating, of its shape, dense or sparse COO."""
    return (
        isinstance(g, Tensor)
        and g.shape == _shape(p)
        and g.is_floating_point()
        and g.layout in (torch.strided, torch.sparse_coo)
    )


def _shape(p: Tensor) -> tuple[int, ...]:
    """Return the shape of a gradient of ``p``, whose complex numbers are pairs."""
    return (*p.shape, 2) if p.is_complex() else tuple(p.shape)


def _compact(g: Tensor) -> Tensor:
    """Return ``g``, or a copy if ``g`` is a view that would keep the memory of a larger tensor alive."""
    if g.layout != torch.strided or g.untyped_storage().nbytes() <= g.numel() * g.element_size():
        return g
    return g.clone()


def bools_on(values: Sequence[bool], device: torch.device) -> Tensor:
    """Return ``values`` as (T,) bool on ``device``.

    The device fills it in: a copy from the host would wait, and a captured graph would lose it.
    """
    majority = sum(values) > len(values) / 2
    result = torch.full((len(values),), majority, dtype=torch.bool, device=device)
    for i, value in enumerate(values):
        if value != majority:
            result[i].fill_(value)
    return result

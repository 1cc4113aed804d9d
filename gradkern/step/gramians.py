"""The Gramians of a step through activations, added up parameter by parameter."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkern.gradients.activations.factors import Found
from gradkern.gradients.activations.products import products, sketched_products
from gradkern.gradients.layouts import layouts_of
from gradkern.gradients.param_grads import laid_out, readable
from gradkern.gradients.parameters import Targets
from gradkern.modifiers.sketch import Sketch
from gradkern.ops import operators
from gradkern.ops.arguments import TaskGrads
from gradkern.step.sparse_rows import rows_that_occur


class Gramians:
    """Sums of dot products for each group.

    Args:
        targets: the parameters.
        shared: the places of those under surgery.
        n_tasks: T.
        sketch: estimates the dot products; None for exact ones.

    Attributes:
        M: (S, T, T), the Gramians, float64 if any of the gradients is, else float32.
        exact: (S, T, T), the exact Gramians, if ``sketch`` reports its error; else None.
    """

    def __init__(self, targets: Targets, shared: Sequence[int], n_tasks: int, sketch: Sketch | None) -> None:
        self._targets = targets
        self._sketch = sketch
        dtypes = {targets.layouts.dtypes[k] for k in shared}
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        shape = (targets.grouping.n_segments, n_tasks, n_tasks)
        self.M = torch.zeros(shape, dtype=dtype, device=targets.device)
        self.exact = torch.zeros_like(self.M) if sketch is not None and sketch.report else None

    def add(self, found: Found) -> None:
        """Add the dot products of a parameter that a task reaches."""
        sketch = self._sketch
        if found.weight is None:
            self._add(found.place, self._of_row(found.place, found.rows[0]), None)
        elif sketch is None:
            self._add(found.place, products(found.weight, found.passed), None)
        else:
            exact = products(found.weight, found.passed) if sketch.report else None
            self._add(found.place, sketched_products(found.weight, found.passed, sketch), exact)

    def add_products(self, M: Tensor) -> None:
        """Add dot products of rows, (S, T, T)."""
        self.M += M
        if self.exact is not None:
            self.exact += M

    def _of_row(self, k: int, grads: Sequence[Tensor | None]) -> Tensor:
        """Return the dot products of the T gradients of parameter ``k``."""
        p = self._targets.tensors[k]
        column = [readable([g], [p], layouts_of([p]))[0] for g in grads]
        are_sparse = {g.is_sparse for g in column if g is not None}
        if are_sparse == {True}:
            column = rows_that_occur(column)
        elif True in are_sparse:
            column = [laid_out(g, p) if g is not None and g.is_sparse else g for g in column]
        return operators.gramian_tensors(TaskGrads(column, [0], 1))[0]

    def _add(self, k: int, M: Tensor, exact: Tensor | None) -> None:
        segment = self._targets.groups[k]
        self.M[segment] += M
        if self.exact is not None:
            self.exact[segment] += M if exact is None else exact

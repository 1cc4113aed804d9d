"""The Gramians of a step through activations, added up parameter by parameter."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkern.gradients.activations.products import Passed, Weight, products, sketched_products
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

    def add(self, weight: Weight, passed: Sequence[Passed]) -> None:
        """Add the dot products of a weight; ``passed`` is what has passed through its layers, one or more."""
        exact = products(weight, passed) if self._sketch is None or self._sketch.report else None
        if self._sketch is None:
            assert exact is not None
            self._add(self.M, weight.place, exact)
            return
        self._add(self.M, weight.place, sketched_products(weight, passed, self._sketch))
        if exact is not None:
            self._add_exact(weight.place, exact)

    def add_row(self, k: int, grads: Sequence[Tensor | None]) -> None:
        """Add the dot products of the T gradients of parameter ``k``."""
        p = self._targets.tensors[k]
        column = [readable([g], [p], layouts_of([p]))[0] for g in grads]
        are_sparse = {g.is_sparse for g in column if g is not None}
        if are_sparse == {True}:
            column = rows_that_occur(column)
        elif True in are_sparse:
            column = [laid_out(g, p) if g is not None and g.is_sparse else g for g in column]
        found = operators.gramian_tensors(TaskGrads(column, [0], 1))[0]
        self._add(self.M, k, found)
        self._add_exact(k, found)

    def add_rows(self, products: Tensor) -> None:
        """Add the dot products of rows, (S, T, T)."""
        self.M += products
        if self.exact is not None:
            self.exact += products

    def _add(self, M: Tensor, k: int, products: Tensor) -> None:
        M[self._targets.groups[k]] += products

    def _add_exact(self, k: int, products: Tensor) -> None:
        if self.exact is not None:
            self._add(self.exact, k, products)

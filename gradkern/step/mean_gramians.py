"""The Gramians of a step through activations on several ranks: dot products of the means of the ranks' gradients.

A mean over ranks has cross terms: the dot product of a task's gradient on one rank with another's on another rank. So
the ranks exchange gradients, a parameter after another, or sketches of these. Each gets the mean of its part of the
columns, and multiplies that; the products of the parts add up.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from gradkern.distributed.comm import Comm
from gradkern.gradients.activations.factors import Found
from gradkern.gradients.activations.products import Weight, sketched_rows, task_grads
from gradkern.gradients.layouts import Layouts
from gradkern.gradients.param_grads import as_real
from gradkern.gradients.parameters import Targets
from gradkern.modifiers.sketch import Sketch
from gradkern.ops import operators
from gradkern.ops.dtypes import arithmetic_dtype


class MeanGramians:
    """Sums of dot products for each group.

    Args:
        targets: the parameters.
        layouts: the layouts of their leaves in the graphs, whole ones.
        weights: those that have factors, by place.
        sequence: the places of parameters under surgery in the order in which :meth:`adding` gets them, on all ranks.
        n_tasks: T.
        sketch: estimates the dot products; None for exact ones.
        comm: the ranks.
    """

    def __init__(
        self,
        targets: Targets,
        layouts: Layouts,
        weights: dict[int, Weight],
        sequence: Sequence[int],
        n_tasks: int,
        sketch: Sketch | None,
        comm: Comm,
    ) -> None:
        self._targets = targets
        self._layouts = layouts
        self._weights = weights
        self._places = frozenset(sequence)
        self._left = deque(sequence)
        self._n_tasks = n_tasks
        self._sketch = sketch
        self._comm = comm
        dtypes = {layouts.dtypes[k] for k in sequence}
        self._dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        shape = (targets.grouping.n_segments, n_tasks, n_tasks)
        self._own = torch.zeros(shape, dtype=torch.float64, device=targets.device)

    def adding(self, found: Iterable[Found]) -> Iterator[Found]:
        """Yield parameters, after the dot products of those under surgery have been added."""
        for one in found:
            if one.place in self._places:
                assert one.place == self._left[0], "all ranks have the same order"
                self._add(one)
            yield one

    def _add(self, found: Found) -> None:
        k, weight = found.place, found.weight
        if not found.tasks:
            self._reduce(k, self._zeros(k, self._width(k)))
        elif weight is None:
            self._reduce(k, self._matrix(k, found.rows[0]))
        elif self._is_sketched(weight):
            assert self._sketch is not None
            self._reduce(k, sketched_rows(weight, found.passed, self._sketch).flatten(1))
        else:
            self._reduce(k, self._matrix(k, task_grads(found.passed)))

    def add_zeros(self) -> None:
        """Add zeros for all that is left: this rank has raised, and the others wait for it."""
        while self._left:
            self._reduce(self._left[0], self._zeros(self._left[0], self._width(self._left[0])))

    def total(self) -> Tensor:
        """Return the Gramians, (S, T, T), the same on all ranks."""
        return self._comm.summed(self._own).to(self._dtype)

    def _is_sketched(self, weight: Weight) -> bool:
        """Return whether a sketch is smaller than the gradient, whatever the number of tokens on a rank."""
        columns = None if self._sketch is None else self._sketch.columns
        return columns is not None and weight.is_sketchable and columns < weight.layers[0].p

    def _width(self, k: int) -> int:
        """Return the number of columns that parameter ``k`` is sent with."""
        weight = self._weights.get(k)
        if weight is None or self._sketch is None or not self._is_sketched(weight):
            return self._layouts.numels[k]
        return weight.layers[0].q * self._sketch.columns

    def _matrix(self, k: int, grads: Sequence[Tensor | None]) -> Tensor:
        """Return gradients of a parameter as rows, their numbers in the order of its positions."""
        X = self._zeros(k, self._layouts.numels[k])
        for row, g in zip(X, grads, strict=True):
            if g is not None:
                row.copy_(as_real(g.to_dense()).reshape(-1))
        return X

    def _zeros(self, k: int, width: int) -> Tensor:
        dtype = arithmetic_dtype(self._layouts.dtypes[k])
        return torch.zeros((self._n_tasks, width), dtype=dtype, device=self._targets.device)

    def _reduce(self, k: int, X: Tensor) -> None:
        """Add the dot products of the means over the ranks of ``X``, this rank's T rows of parameter ``k``."""
        ranks, T = self._comm.size, self._n_tasks
        width = -(-X.shape[1] // ranks)
        parts = pad(X, (0, ranks * width - X.shape[1])).view(T, ranks, width).transpose(0, 1).reshape(-1)
        shard = parts.new_empty(T * width)
        work = self._comm.mean_of_shard(shard, parts, self._comm.room(parts))
        self._left.popleft()  # what raises before has not been sent, and zeros take its place
        work.wait()
        self._own[self._targets.groups[k]] += operators.gramian(shard.view(T, width))

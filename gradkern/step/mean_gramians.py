"""The Gramians of a step through activations on several ranks: dot products of the means of the ranks' gradients.

A mean over ranks has cross terms: the dot product of a task's gradient on one rank with another's on another rank. So
the ranks exchange gradients, a parameter after another, or sketches of these. Each gets the mean of its part of the
columns, and multiplies that; the products of the parts add up.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

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


class _Message(NamedTuple):
    """The form in which ranks send a parameter.

    Attributes:
        place: the number of the parameter.
        is_sketch: whether it is the sketch, and not the gradients.
        width: the number of columns.
    """

    place: int
    is_sketch: bool
    width: int


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
        self._n_tasks = n_tasks
        self._sketch = sketch
        self._comm = comm
        self._reports = sketch is not None and sketch.report
        self._places = frozenset(sequence)
        self._left = deque(message for k in sequence for message in self._messages(k))
        dtypes = {layouts.dtypes[k] for k in sequence}
        self._dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        shape = (targets.grouping.n_segments, n_tasks, n_tasks)
        self._M = torch.zeros(shape, dtype=torch.float64, device=targets.device)
        self._exact = torch.zeros_like(self._M)

    def adding(self, found: Iterable[Found]) -> Iterator[Found]:
        """Yield parameters, after the dot products of those under surgery have been added."""
        for one in found:
            if one.place in self._places:
                for message in self._messages(one.place):
                    assert message == self._left[0], "all ranks have the same order"
                    self._send(message, self._rows(message, one))
            yield one

    def add_zeros(self) -> None:
        """Add zeros for all that is left: this rank has raised, and the others wait for it."""
        while self._left:
            self._send(self._left[0], self._zeros(self._left[0]))

    def totals(self) -> tuple[Tensor, Tensor | None]:
        """Return the Gramians, (S, T, T), and the exact ones if the sketch reports its error; the same on all ranks."""
        M = self._comm.summed(self._M).to(self._dtype)
        return M, self._comm.summed(self._exact).to(self._dtype) if self._reports else None

    def _messages(self, k: int) -> list[_Message]:
        """Return what is sent of a parameter: its sketch where that is smaller, however many tokens a rank has."""
        weight, columns = self._weights.get(k), None if self._sketch is None else self._sketch.columns
        whole = _Message(k, False, self._layouts.numels[k])
        if weight is None or columns is None or not weight.is_sketchable or columns >= weight.layers[0].p:
            return [whole]
        sketched = _Message(k, True, weight.layers[0].q * columns)
        return [sketched, whole] if self._reports else [sketched]

    def _rows(self, message: _Message, found: Found) -> Tensor:
        """Return T rows of a parameter's gradients, or of their sketch."""
        if message.is_sketch and found.passed:
            assert found.weight is not None, "it is one that has factors"
            assert self._sketch is not None
            return sketched_rows(found.weight, found.passed, self._sketch).flatten(1)
        X = self._zeros(message)
        if found.weight is None:
            grads = found.rows[0]
        else:
            grads = task_grads(found.passed) if found.passed else [None] * self._n_tasks
        for row, g in zip(X, grads, strict=True):
            if g is not None:
                row.copy_(as_real(g.to_dense()).reshape(-1))
        return X

    def _zeros(self, message: _Message) -> Tensor:
        dtype = arithmetic_dtype(self._layouts.dtypes[message.place])
        return torch.zeros((self._n_tasks, message.width), dtype=dtype, device=self._targets.device)

    def _send(self, message: _Message, X: Tensor) -> None:
        """Add the dot products of the means over the ranks of ``X``, this rank's T rows."""
        ranks, T = self._comm.size, self._n_tasks
        width = -(-X.shape[1] // ranks)
        parts = pad(X, (0, ranks * width - X.shape[1])).view(T, ranks, width).transpose(0, 1).reshape(-1)
        shard = parts.new_empty(T * width)
        work = self._comm.mean_of_shard(shard, parts, self._comm.room(parts))
        self._left.popleft()  # what raises before has not been sent, and zeros take its place
        work.wait()
        products = operators.gramian(shard.view(T, width))
        segment = self._targets.groups[message.place]
        if message.is_sketch:
            self._M[segment] += products
            return
        self._exact[segment] += products
        if len(self._messages(message.place)) == 1:
            self._M[segment] += products

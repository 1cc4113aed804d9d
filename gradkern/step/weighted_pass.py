"""The sink of a step whose weights are known before its update: torch's own backward pass of Σ w_i L_i.

Parameters of one task are not weighted. So each loss begins with a gradient of 1, and a hook multiplies by w_i what
passes from a node of task i alone to one that several tasks reach. (A loss from which another one was computed has no
such node of its own. It begins with w_i.)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gradkern.distributed.comm import Comm
from gradkern.gradients.activations.graphs import Graphs
from gradkern.gradients.engine import raise_explained
from gradkern.gradients.layouts import Row
from gradkern.gradients.losses import Losses
from gradkern.gradients.parameters import Targets
from gradkern.step.activation_rows import ActivationRows
from gradkern.step.mean_backward import mean_grads
from gradkern.step.sinks import GradSink
from gradkern.step.step_rows import StepRows
from gradkern.step.surgery import Outcome


class WeightedPassSink(GradSink):
    """Runs torch's own backward pass of the weighted losses.

    Args:
        losses: the losses, whose graphs are kept until then.
    """

    def __init__(self, losses: Losses) -> None:
        self._losses = losses
        self._retain_graph = losses.retain_graph
        losses.retain_graph = True

    def prepare(self, rows: StepRows | None, outcome: Outcome, targets: Targets) -> None:
        """Take the weights, and the gradients of the method's own parameters."""
        super().prepare(rows, outcome, targets)
        assert isinstance(rows, ActivationRows)
        assert outcome.solution is not None
        self._graphs, self._targets, self._shared = rows.graphs, targets, rows.arrangement.shared
        self._w, self._unshared = outcome.solution.weights[0], outcome.unshared_weights

    def commit(self, step_scale: Tensor | None) -> Tensor | None:
        """Run the backward pass."""
        losses = list(self._graphs.losses.values())
        try:
            with self._weighted() as seeds:
                inputs = self._targets.tensors
                torch.autograd.backward(losses, seeds, inputs=inputs, retain_graph=self._retain_graph)
        except RuntimeError as error:
            raise_explained("one of losses", losses, error)
            raise
        return super().commit(step_scale)

    @contextmanager
    def _weighted(self) -> Iterator[list[Tensor]]:
        """Weigh what passes between tasks within the block; yield the gradients that the losses begin with."""
        hooks = list(_weighted_where_tasks_meet(self._graphs, self._w)) if self._unshared is None else []
        try:
            yield [self._seed(i, loss) for i, loss in self._graphs.losses.items()]
        finally:
            for hook in hooks:
                hook.remove()

    def _seed(self, i: int, loss: Tensor) -> Tensor:
        if self._unshared is not None:  # the method weighs the whole loss
            return torch.empty_like(loss).copy_(self._unshared[i])
        root, _ = self._graphs.trace.roots[i]
        return torch.empty_like(loss).copy_(self._w[i]) if self._graphs.trace.is_shared(root) else torch.ones_like(loss)


class MeanWeightedPassSink(WeightedPassSink):
    """Writes the mean over the ranks of the gradients of the weighted losses.

    Args:
        losses: the losses, whose graphs are kept until then.
        comm: the ranks.
    """

    def __init__(self, losses: Losses, comm: Comm) -> None:
        super().__init__(losses)
        self._comm = comm

    def commit(self, step_scale: Tensor | None) -> Tensor | None:
        """Run the backward pass, and write the means over the ranks."""
        self._results = [*mean_grads(self._comm, self._targets, self._differentiate), *self._results]
        return GradSink.commit(self, step_scale)

    def _differentiate(self) -> Row:
        """Return the gradients of this rank's weighted losses."""
        losses, targets = tuple(self._graphs.losses.values()), self._targets
        with self._weighted() as seeds:
            differentiate = self._losses.differentiate
            passed = differentiate("one of losses", losses, targets.tensors, self._retain_graph, tuple(seeds))
        grads = list(passed)
        if self._unshared is None:
            for c in self._shared:
                g, tasks = grads[c.place], self._graphs.tasks[c.place]
                if g is not None and len(tasks) == 1:  # other ranks have the other tasks, so no hook has seen them meet
                    grads[c.place] = g * self._w[tasks[0]].to(g.dtype)
        return grads


def _weighted_where_tasks_meet(graphs: Graphs, w: Tensor) -> Iterator[Any]:
    """Yield the handles of hooks that multiply by w_i what leaves the part of the graph that task i has alone."""
    trace = graphs.trace
    for node in trace.order:
        if not trace.is_shared(node):
            numbers = [k for k, (below, _) in enumerate(node.next_functions) if below and trace.is_shared(below)]
            if numbers:
                weight = w[trace.tasks[node].bit_length() - 1]
                yield node.register_hook(lambda grads, _, at=numbers, weight=weight: _scaled(grads, at, weight))


def _scaled(grads: Sequence[Tensor | None], at: Sequence[int], weight: Tensor) -> tuple[Tensor | None, ...]:
    return tuple([g if g is None or k not in at else g * weight.to(g.dtype) for k, g in enumerate(grads)])

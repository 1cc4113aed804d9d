"""The graphs of a step's losses, and which parameters they reach."""

from collections.abc import Sequence

from torch import Tensor

from gradkern.gradients import graph
from gradkern.gradients.activations.trace import Trace
from gradkern.gradients.losses import Losses, unreached
from gradkern.gradients.parameters import Targets


class Graphs:
    """The graphs of a step's losses, searched.

    Args:
        source: the losses, opened: tensors.
        targets: n parameters.
        leaves: the leaves that the graphs have of these; None for the parameters themselves.

    Attributes:
        leaves: n leaves.
        losses: the losses of present tasks, by number.
        trace: their nodes.
        n_tasks: T.
        tasks: for each parameter the tasks whose losses reach it.

    Raises:
        ValueError: a loss reaches no parameter, or a graph holds reentrant checkpointing.
    """

    def __init__(self, source: Losses, targets: Targets, leaves: Sequence[Tensor] | None = None) -> None:
        self.leaves = targets.tensors if leaves is None else leaves
        self.losses = dict(source.graphs())
        self.trace = Trace(self.losses)
        if graph.hides_parameters(self.trace.order):
            for i, loss in self.losses.items():
                graph.refuse_reentrant(f"losses[{i}]", loss)
        self.n_tasks = len(source.present)
        self.tasks = [self._tasks_of(p) for p in self.leaves]
        for i in self.losses:
            if not any(i in tasks for tasks in self.tasks):
                raise unreached(i)

    def _tasks_of(self, p: Tensor) -> Sequence[int]:
        bits = self.trace.tasks[self.trace.leaves[p]] if p in self.trace.leaves else 0
        return [i for i in self.losses if bits >> i & 1]

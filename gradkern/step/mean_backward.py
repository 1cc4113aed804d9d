"""The sink of a method that weighs losses, on several ranks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradkern.aggregators import Scalarization
from gradkern.aggregators.weightings.scalarization import Tasks
from gradkern.distributed.agreement import together
from gradkern.distributed.comm import Comm
from gradkern.distributed.draws import same_draws
from gradkern.distributed.reduction import mean_row
from gradkern.gradients.layouts import Row
from gradkern.gradients.losses import Losses
from gradkern.gradients.param_grads import added, readable
from gradkern.gradients.parameters import Targets
from gradkern.gradients.sharded import as_dtensor, is_dtensor
from gradkern.step.on_ranks import agreed_reach, mean_losses, refuse_sparse, refuse_switched
from gradkern.step.shard_rows import buckets_for, results_of
from gradkern.step.sinks import WeightedBackwardSink, accumulate


class MeanBackwardSink(WeightedBackwardSink):
    """Writes the mean over the ranks of the gradients of Σ w_i L_i. The weights depend on the losses' means.

    Args:
        losses: the losses.
        method: the method that weighs them, without the Gramian.
        comm: the ranks.
    """

    def __init__(self, losses: Losses, method: Scalarization, comm: Comm) -> None:
        super().__init__(losses, method)
        self.comm = comm
        self._means: Tensor | None = None

    def commit(self, step_scale: Tensor | None) -> Tensor | None:
        """Run the backward passes, and write the means over the ranks."""
        targets = self._targets
        means = dict(mean_grads(self.comm, targets, self._differentiate))
        own = self._observed()
        accumulate([*((p, means[p]) for p in targets.tensors if p in means), *own])
        return None

    def mean_losses(self) -> Tensor:
        """Return the losses, (T,), means over the ranks; they have been computed on all of them."""
        if self._means is None:
            self._means = mean_losses(self.comm, self.losses.values, self._told, self._targets)
        return self._means

    def _differentiate(self) -> Row:
        """Return the gradients of this rank's weighted sum."""
        targets = self._targets
        sums: Sequence[Tensor | None] = [None] * len(targets.tensors)
        if self._present is None:
            for _, grads in self.losses.weighted_passes(targets.tensors, self._weights):
                sums = [total if g is None else added(total, g) for total, g in zip(sums, grads, strict=True)]
                del grads  # free them before the next task's pass
        else:
            total = self._sum(self._present)
            one = torch.ones_like(total)
            sums = self.losses.differentiate("one of losses", (total,), targets.tensors, self._retain_graph, (one,))
        refuse_switched(self.losses, targets)
        return sums

    def _graphs(self) -> dict[int, Tensor]:
        if self._targets.has_dtensors:  # as in agreed_reach
            return super()._graphs()
        graphs, _ = together(self.comm, super()._graphs, lambda _: {})
        return graphs

    def _weigh(self, tasks: Tasks) -> Tensor:
        with same_draws(self.comm, self.method, tasks.device):
            return super()._weigh(tasks)


def mean_grads(comm: Comm, targets: Targets, differentiate: Callable[[], Row]) -> list[tuple[Tensor, Tensor]]:
    """Return the parameters that any rank reaches, with the means over the ranks of their gradients.

    Args:
        comm: the ranks.
        targets: n parameters.
        differentiate: returns this rank's n gradients. Those of DTensors are means already.
    """
    row: list[Tensor | None] = []

    def work() -> list[tuple[bool, ...]]:
        grads = differentiate()
        with torch.no_grad():
            row[:] = readable(grads, targets.here, targets.layouts)
        refuse_sparse(0, row, targets)
        return [tuple([g is not None for g in row])]

    (reach,) = agreed_reach(comm, targets, work)
    reached = [k for k, kind in enumerate(reach) if kind is not None]
    places = [k for k in reached if not is_dtensor(targets.tensors[k])]
    with torch.no_grad():
        vectors = mean_row(comm, buckets_for(places, targets.layouts, comm), row, targets.device)
        results = results_of(vectors, targets)
        for p, here, g in zip(targets.tensors, targets.here, row, strict=True):
            if g is not None and is_dtensor(p):
                results.append((p, as_dtensor(torch.view_as_complex(g) if here.is_complex() else g, p)))
    return results

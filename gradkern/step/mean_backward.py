"""The sink of a method that weighs losses, on several ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkern.aggregators import Scalarization
from gradkern.aggregators.weightings.scalarization import Tasks
from gradkern.distributed.agreement import together
from gradkern.distributed.comm import Comm
from gradkern.distributed.draws import same_draws
from gradkern.distributed.reduction import mean_row
from gradkern.gradients.layouts import Row, RowReach
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
        (reach,) = agreed_reach(self.comm, targets, self._differentiate)
        own = self._observed()
        means = dict(mean_results(self.comm, targets, reach, self._row))
        accumulate([*((p, means[p]) for p in targets.tensors if p in means), *own])
        return None

    def mean_losses(self) -> Tensor:
        """Return the losses, (T,), means over the ranks; they have been computed on all of them."""
        if self._means is None:
            self._means = mean_losses(self.comm, self.losses.values, self._told, self._targets)
        return self._means

    def _differentiate(self) -> list[tuple[bool, ...]]:
        """Keep the gradients of this rank's weighted sum; return for each parameter whether there is one."""
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
        with torch.no_grad():
            self._row = readable(sums, targets.here, targets.layouts)
        refuse_sparse(0, self._row, targets)
        return [tuple([g is not None for g in self._row])]

    def _graphs(self) -> dict[int, Tensor]:
        if self._targets.has_dtensors:  # as in agreed_reach
            return super()._graphs()
        graphs, _ = together(self.comm, super()._graphs, lambda _: {})
        return graphs

    def _weigh(self, tasks: Tasks) -> Tensor:
        with same_draws(self.comm, self.method, tasks.device):
            return super()._weigh(tasks)


@torch.no_grad()
def mean_results(comm: Comm, targets: Targets, reach: RowReach, row: Row) -> list[tuple[Tensor, Tensor]]:
    """Return parameters with the means over the ranks of their gradients. Those of DTensors are such means already.

    Args:
        comm: the ranks.
        targets: n parameters.
        reach: which of them have a gradient on any rank.
        row: the n gradients of this rank, as :func:`gradkern.gradients.param_grads.readable` returns them.
    """
    reached = [k for k, kind in enumerate(reach) if kind is not None]
    places = [k for k in reached if not is_dtensor(targets.tensors[k])]
    results = results_of(mean_row(comm, buckets_for(places, targets.layouts, comm), row, targets.device), targets)
    for p, here, g in zip(targets.tensors, targets.here, row, strict=True):
        if g is not None and is_dtensor(p):
            results.append((p, as_dtensor(torch.view_as_complex(g) if here.is_complex() else g, p)))
    return results

"""The rows of a step with DTensors among its parameters: of each gradient the part that this rank holds."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from gradkern.distributed.comm import Comm
from gradkern.distributed.reduction import mean_row
from gradkern.gradients.layouts import PLANS, Row
from gradkern.gradients.losses import Losses, Source, unscaled
from gradkern.gradients.memory import bools_on
from gradkern.gradients.param_grads import new_grad, readable
from gradkern.gradients.parameters import Targets
from gradkern.gradients.plan import Arrangement, Column
from gradkern.gradients.sharded import as_dtensor, is_dtensor, n_replicas
from gradkern.step.begin import Start
from gradkern.step.gather import tells_absent
from gradkern.step.on_ranks import agreed_reach, mean_losses, refuse_sparse, refuse_switched
from gradkern.step.options import Options
from gradkern.step.rows import Combined, Results, Rows, eps_of
from gradkern.step.shard_rows import buckets_for, laid_like


@dataclass(frozen=True, kw_only=True)
class PartRows(Rows):
    """The parts of T rows that this rank holds. The Gramian is that of whole rows.

    ``params``, ``grads`` and ``arrangement`` are of these parts; an empty part has no column. What several ranks hold
    counts once.

    Attributes:
        comm: the ranks.
        targets: the n parameters.
        whole: the columns of the n parameters.
        replicas: for each parameter, the number of ranks that hold this part of it.
    """

    comm: Comm
    targets: Targets
    whole: Arrangement
    replicas: Sequence[int]

    @property
    def device(self) -> torch.device:
        """The device of all parameters."""
        return self.targets.device

    @property
    def eps(self) -> tuple[float, ...] | None:
        """As for :class:`Rows`, of whole rows: some groups may have no part here."""
        return eps_of(self.whole)

    @property
    def of_params(self) -> Arrangement:
        """As for :class:`Rows`."""
        return self.whole

    def shared_grads(self) -> Iterator[tuple[Column, list[Tensor]]]:
        """Yield nothing: no rank has whole gradients."""
        return iter(())

    def only(self, columns: Iterable[Column]) -> "PartRows":
        """Return the rows of some of the whole columns."""
        whole = self.whole.of(columns)
        return replace(self, whole=whole, arrangement=_not_empty(whole))

    def gramian(self, unshared: bool) -> Tensor:
        """Return the dot products of whole rows, (S, T, T), the same bits on all ranks; see :meth:`Rows.gramian`."""
        assert not unshared, "the optimizer's own step is for one rank"
        in_float64 = any(c.dtype == torch.float64 for c in self.whole.shared or self.whole.columns)
        total = torch.zeros((self.n_segments, self.n_tasks, self.n_tasks), dtype=torch.float64, device=self.device)
        for n in sorted({self.replicas[c.place] for c in self.whole.columns}):
            rows = self.only(c for c in self.whole.columns if self.replicas[c.place] == n)
            total += super(PartRows, rows).gramian(False).double() / n
        M = self.comm.summed(total)
        return M if in_float64 else M.float()

    def combine(self, w: Tensor, unshared_weights: Tensor | None) -> Combined:
        """Return each parameter with its combination, a DTensor with a DTensor; see :meth:`Rows.combine`."""
        pairs, share = super().combine(w, unshared_weights)
        parts = {id(p): g for p, g in pairs}
        results = []
        for c in self.whole.columns:
            p, here = self.targets.tensors[c.place], self.params[c.place]
            g = parts.get(id(here))
            if g is None:  # the part is empty
                g = new_grad(here, c.dtype)
                g = torch.view_as_complex(g) if c.complex else g
            results.append((p, as_dtensor(g, p)))
        return results, share

    def results(self) -> Results:
        """Raise NotImplementedError: whole results are on no rank."""
        raise NotImplementedError("GradAttention(update='subset') is not for DTensors in params: leave update out")

    def entries(self, columns: Sequence[Column], numels: Sequence[int], index: Tensor) -> Tensor:
        """Raise NotImplementedError: sampled entries of whole rows are on no rank."""
        raise NotImplementedError("GradAttention is not for DTensors in params yet")


def part_rows(source: Source, options: Options, begun: Start) -> PartRows:
    """Return the parts of the step's rows that this rank holds.

    Args:
        source: the source, opened.
        options: the method and its modifiers.
        begun: what the ranks have agreed on.
    """
    comm, targets, present, _, _ = begun
    own: list[Row] = [[None] * len(targets.tensors)] * len(present)
    reach = agreed_reach(comm, targets, lambda: _passes(source, targets, own))
    whole = targets.arranged(reach, None, None)
    if not whole.columns:
        raise ValueError("no task has a gradient for any parameter that requires grad")
    return PartRows(
        targets.here,
        [_with_means(comm, targets, row, kinds) for row, kinds in zip(own, reach, strict=True)],
        _not_empty(whole),
        present=bools_on(present, targets.device) if tells_absent(present, options) else None,
        losses=unscaled(mean_losses(comm, source.values, present, targets), source),
        loss_scale=source.loss_scale,
        comm=comm,
        targets=targets,
        whole=whole,
        replicas=[n_replicas(p, comm.size) for p in targets.tensors],
    )


def _passes(source: Source, targets: Targets, own: list[Row]) -> list[tuple[bool, ...]]:
    """Run the backward passes, and put the gradients into ``own``; return which parameters each task reaches."""
    reached = [(False,) * len(own[0])] * len(own)
    # What a pass puts into ``.grad`` is nobody else's.
    passes = partial(source.passes, keep=False) if isinstance(source, Losses) else source.passes
    for t, grads in passes(targets.tensors):
        row = parts_of(grads, targets)
        refuse_sparse(t, row, targets)
        own[t], reached[t] = row, tuple([g is not None for g in row])
        del grads, row  # free them before the next task's pass
    refuse_switched(source, targets)
    return reached


def parts_of(grads: Row, targets: Targets) -> Row:
    """Return one task's gradients on this rank, each laid out as a new ``.grad`` of its parameter's part."""
    with torch.no_grad():
        return readable(grads, targets.here, targets.layouts)


def _with_means(comm: Comm, targets: Targets, row: Row, kinds: Sequence[object]) -> Row:
    """Return a row with means over the ranks in place of gradients of parameters that are no DTensors."""
    plain = [k for k, p in enumerate(targets.tensors) if kinds[k] is not None and not is_dtensor(p)]
    if not plain:
        return row
    means = mean_row(comm, buckets_for(plain, targets.layouts, comm, 1), row, targets.device)
    return [laid_like(k, means[k], targets) if k in means else g for k, g in enumerate(row)]


@lru_cache(maxsize=PLANS)
def _not_empty(whole: Arrangement) -> Arrangement:
    """Return the arrangement of columns with numbers on this rank."""
    return whole.of(c for c in whole.columns if c.numel)

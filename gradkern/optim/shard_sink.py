"""The sink of a step of AdamW on several ranks, each of which has the moments of some rows of the parameters.

Each rank combines its rows of the gradients and steps its rows of the parameters; then all get the rows of all. So a
step moves as many words as one that puts whole gradients together.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradkern.arguments import boolean
from gradkern.distributed.by_rows import ByRows, cut_of
from gradkern.distributed.comm import ProcessGroup
from gradkern.gradients.parameters import Targets
from gradkern.gradients.sharded import parts_here
from gradkern.optim.adamw import AdamW, Combination, along_parts
from gradkern.optim.fused_sink import FusedAdamWSink, can_fuse, needs_no_grad
from gradkern.step.options import Options
from gradkern.step.rank_rows import RankRows
from gradkern.step.rows import Rows
from gradkern.step.step_rows import StepRows
from gradkern.step.surgery import Outcome


def refuse_uncut(optimizer: Optimizer, shard_optimizer: bool) -> None:
    """Raise TypeError if an optimizer is to have its state cut among ranks, and cannot."""
    if boolean("shard_optimizer", shard_optimizer) and type(optimizer) is not AdamW:
        raise TypeError(
            f"optimizer must be a gradkern.optim.AdamW with shard_optimizer=True, got {type(optimizer).__name__}; "
            "torch.distributed.optim.ZeroRedundancyOptimizer shards others"
        )


def cut_state(optimizer: Optimizer, process_group: ProcessGroup | bool | None, is_cut: bool) -> ByRows | None:
    """Return the cut of an optimizer's state among the ranks, and let the optimizer have it; None for no cut."""
    if not isinstance(optimizer, AdamW):
        return None
    optimizer.by_rows = cut_of(process_group, optimizer.by_rows) if is_cut else None  # another wrapper of it may cut
    return optimizer.by_rows


class ShardedAdamWSink(FusedAdamWSink):
    """Steps along the combination, of which each rank has a part. Each instance serves one update.

    Its arguments and attributes are those of :class:`FusedAdamWSink`, whose ``adamw`` has a cut by rows.
    """

    takes_combination = True
    takes_rows = True

    @property
    def needs_unshared(self) -> bool:
        """False: the combination itself is there."""
        return False

    @property
    def common(self) -> tuple[object, ...]:
        """What decides on the messages of its step, and on the length of that."""
        return "rows", self.max_norm, self.scaler is not None

    def check(self, rows: StepRows) -> None:
        """Raise if the step would, before anything has changed."""
        if isinstance(rows, RankRows):
            rows = Rows(rows.targets.tensors, (), rows.whole)
        super().check(rows)

    def prepare(self, rows: StepRows | None, outcome: Outcome, targets: Targets) -> None:
        """Combine the rows."""
        results, self._kept = outcome.combine()
        self._params = [p for p, _ in results]
        self._parts = parts_here(self._cut.all_here([g for _, g in results], self._params))

    def commit(self, step_scale: Tensor | None) -> Tensor | None:
        """Step along the combination; return the share of entries that the mask kept."""
        super().commit(step_scale)
        return self._kept

    @property
    def _cut(self) -> ByRows:
        cut = self.adamw.by_rows
        assert cut is not None, "its optimizer's state is cut"
        return cut

    def _direction(self) -> Combination:
        return along_parts(self._params, self._parts)

    def _is_finite(self, direction: Combination) -> Tensor:
        finite = torch.stack([g.isfinite().all() for g in self._parts]).all()
        return self._cut.comm.summed((~finite).to(torch.float32)) == 0

    def _norm(self, direction: Combination) -> Tensor:
        """Return the norm of the combination over all parameters, (); what several ranks have counts once."""
        squares = [
            torch.linalg.vector_norm(g, dtype=torch.float64).square() / self._cut.replicas(p)
            for p, g in zip(self._params, self._parts, strict=True)
        ]
        norm = self._cut.comm.summed(torch.stack(squares).sum()).sqrt()
        return (norm * direction.w.abs().squeeze()).to(direction.w.dtype)


def update_sink(
    options: Options, params: Sequence[Tensor], cut: ByRows | None, step: tuple[Any, ...]
) -> FusedAdamWSink | None:
    """Return what takes an update's step without ``.grad``; None if that has to be written.

    Args:
        options: the options of the step.
        params: the optimizer's parameters.
        cut: the cut of its state among ranks; None for no cut.
        step: the arguments of :class:`FusedAdamWSink`.
    """
    optimizer, _, _, max_norm, scaler = step
    if cut is not None:
        return ShardedAdamWSink(*step) if needs_no_grad(options, params) else None
    is_measured = max_norm is not None or scaler is not None
    return FusedAdamWSink(*step) if can_fuse(optimizer, options, params, is_measured) else None

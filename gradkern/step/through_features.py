"""The first half of a step through features: it runs the backward passes of the heads."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradkern.distributed.agreement import Facts, digest
from gradkern.gradients.features import LossesOnFeatures, Trunk
from gradkern.gradients.layouts import Layouts, Row, real_numel
from gradkern.gradients.losses import stacked, unreached, unscaled
from gradkern.gradients.memory import bools_on
from gradkern.gradients.param_grads import new_grad, readable
from gradkern.gradients.parameters import Targets
from gradkern.gradients.plan import Arrangement, Column
from gradkern.step.begin import Start
from gradkern.step.feature_rows import FeatureRows
from gradkern.step.gather import as_now, row_of, tells_absent
from gradkern.step.on_ranks import agreed_reach, mean_losses, refuse_switched
from gradkern.step.options import Options


class _Heads(NamedTuple):
    """The results of the heads' backward passes."""

    targets: Targets
    """The n parameters as the callables have left them."""
    trunk: Trunk
    """The part of the model that no pass has gone through."""
    by_outputs: list[list[Tensor | None]]
    """T rows of gradients by the trunk's outputs."""
    rows: list[Row]
    """T rows of n gradients, None for all parameters below the outputs."""


def through_features(
    source: LossesOnFeatures, targets: Targets, options: Options, begun: Start | None
) -> tuple[Targets, FeatureRows]:
    """Return the n parameters as the callables have left them, and the gradients by the features.

    Args:
        source: the source, opened.
        targets: the parameters when the step began.
        options: the method and its modifiers.
        begun: what the ranks have agreed on; None for this rank alone.
    """
    per_example = options.way.per_example
    if begun is None:
        heads, present, losses = _passed(source, targets), source.present, stacked(source.values, targets.tensors[0])
    else:
        heads, present = _passed_on_ranks(source, begun, per_example), begun.present
        losses = mean_losses(begun.comm, source.values, present, targets)
    outputs = heads.trunk.outputs
    rows = FeatureRows(
        outputs,
        heads.by_outputs,
        _arranged(outputs, heads.by_outputs),
        present=bools_on(present, targets.device) if tells_absent(present, options) else None,
        losses=unscaled(losses, source),
        loss_scale=source.loss_scale,
        source=source,
        targets=heads.targets,
        below=[targets.tensors[k] for k in heads.trunk.below(targets.tensors)],
        heads=heads.rows,
        per_example=per_example,
        comm=None if begun is None else begun.comm,
    )
    return heads.targets, rows


def _passed(source: LossesOnFeatures, targets: Targets) -> _Heads:
    """Run the backward passes of the heads."""
    trunk, T = source.trunk(targets.tensors), len(source.present)
    _check(trunk.outputs, targets)
    outputs = [h.detach() for h in trunk.outputs]  # only leaves have a dtype of gradients
    layouts = Layouts(outputs)
    by_outputs: list[list[Tensor | None]] = [[None] * len(trunk.outputs) for _ in range(T)]
    rows: list[Row] = [[None] * len(targets.tensors)] * T
    for i, of_head in source.head_passes(targets.tensors, trunk):
        if all(g is None for g in (*of_head.by_outputs, *of_head.row)) and not source.frozen_grads.get(i):
            raise unreached(i)
        by_outputs[i] = readable([_dense(g) for g in of_head.by_outputs], outputs, layouts)
        rows[i] = readable(of_head.row, targets.tensors, targets.layouts)
        del of_head  # free them before the next head's pass
    now, taken = as_now(source, targets, [*rows])
    return _Heads(now, trunk, by_outputs, [row_of(one, now) for one in taken])


def _check(outputs: Sequence[Tensor], targets: Targets) -> None:
    """Raise TypeError or ValueError unless there are outputs, all of which can have dot products."""
    if not outputs:
        raise ValueError(
            "features reach no parameter that is trained: none of them was computed from any of params that requires "
            "grad, and through='features' has nothing to combine. Give the output of the trunk, not detached; or "
            "through='rows'"
        )
    for h in outputs:
        if h.layout is not torch.strided or h.is_nested:
            raise TypeError(
                f"features must be dense tensors with through='features', got {'nested' if h.is_nested else h.layout}"
            )
        if h.device != targets.device:
            raise ValueError(
                f"features must be on the parameters' device, {targets.device}, with through='features'; got {h.device}"
            )


def _dense(g: Tensor | None) -> Tensor | None:
    return g.to_dense() if g is not None and g.is_sparse else g


def _passed_on_ranks(source: LossesOnFeatures, begun: Start, per_example: bool) -> _Heads:
    """Run the backward passes of the heads, with zeros where another rank has a gradient and this one has none."""
    passed: list[_Heads] = []

    def work() -> list[tuple[bool, ...]]:
        passed.append(_passed(source, begun.targets))
        refuse_switched(source, begun.targets)
        return [tuple([g is not None for g in row]) for row in passed[0].by_outputs]

    def facts() -> Facts:
        outputs = passed[0].trunk.outputs
        sums = () if per_example else tuple([(h.ndim > 0, *h.shape[1:]) for h in outputs])
        return {"features": digest("features", tuple([str(h.dtype) for h in outputs]), sums)}

    reach = agreed_reach(begun.comm, begun.targets, work, facts)
    (heads,) = passed
    for row, kinds in zip(heads.by_outputs, reach, strict=True):
        for k, (h, kind) in enumerate(zip(heads.trunk.outputs, kinds, strict=True)):
            if kind is not None and row[k] is None:
                row[k] = new_grad(h.detach(), h.dtype.to_real()).zero_()
    return heads


def _arranged(outputs: Sequence[Tensor], grads: Sequence[Row]) -> Arrangement:
    """Return the arrangement of T rows of gradients by a trunk's outputs, all in one group."""
    columns = []
    for k, h in enumerate(outputs):
        tasks = tuple([t for t, row in enumerate(grads) if row[k] is not None])
        if tasks:
            columns.append(Column(k, real_numel(h), h.dtype.to_real(), tasks, 0, -1, False, h.is_complex()))
    return Arrangement(columns, len(outputs), 1)

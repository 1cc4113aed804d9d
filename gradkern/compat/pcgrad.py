"""PCGrad with the interface of WeiChengTseng/Pytorch-PCGrad and of pytorch_optimizer: only the import changes.

Both originals project each task's gradient over all parameters together, heads included. They draw the order from
Python's ``random``, and project onto the task's own original gradient too. By default this class does none of that;
``compat=`` repeats a run of theirs.
"""

import random
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradkern import aggregators
from gradkern.compat.losses import listed
from gradkern.gradients.losses import Loss, Source, losses_named
from gradkern.gradients.parameters import Targets
from gradkern.info import SurgeryInfo
from gradkern.ops.undo import Undo
from gradkern.optim import SurgeryOptimizer
from gradkern.optim.fused_sink import FusedAdamWSink
from gradkern.optim.undo import grads_of, scale_of
from gradkern.step.options import Options
from gradkern.step.rows import Rows
from gradkern.step.sinks import GradSink, Sink
from gradkern.step.step_rows import StepRows
from gradkern.step.surgery import Outcome
from gradkern.step.way import WayArguments

MODES = (None, "original", "pytorch_optimizer")


class PCGrad(SurgeryOptimizer):
    """Runs PCGrad around an optimizer: ``opt = PCGrad(optimizer); opt.pc_backward(losses); opt.step()``.

    With ``compat=None`` it is :class:`gradkern.SurgeryOptimizer` with :class:`gradkern.PCGrad`. A head that one loss
    reaches gets that loss's gradient and has no part in the dot products. No gradient is projected onto its own task's
    gradient. The orders come from torch's generator. A parameter that no loss reaches gets no ``.grad``.

    The other modes repeat old runs up to rounding, given equal seeds of Python's ``random``. They use one Gramian over
    all parameters, and the host waits for it. Each task is projected onto its own gradient too. The ``reduction``
    applies only to parameters that all tasks reach; all others get the sum. Post-accumulate hooks do not run.

    Args:
        optimizer: as for :class:`gradkern.SurgeryOptimizer`, which keeps it as its attribute.
        reduction: of the modified task gradients, "mean" or "sum".
        compat: None; "original" to repeat WeiChengTseng/Pytorch-PCGrad, which takes the mean for any ``reduction``,
            and gives parameters that no task reaches a ``.grad`` of zeros; or "pytorch_optimizer" to repeat that
            library.

    Raises:
        TypeError, ValueError: an argument is not as said above.
    """

    def __init__(self, optimizer: Optimizer, reduction: str = "mean", *, compat: str | None = None) -> None:
        if compat not in MODES:
            raise ValueError(f"compat must be one of {', '.join(map(repr, MODES))}; got {compat!r}")
        method = (aggregators.PCGrad if compat is None else _AsPublished)(reduction=reduction)
        self.compat = compat  # decides on the options, which the constructor checks
        super().__init__(optimizer, method)
        self.reduction = method.reduction = "mean" if compat == "original" else reduction

    def pc_backward(self, objectives: Iterable[Loss] | Tensor, retain_graph: bool = False) -> SurgeryInfo:
        """Clear every ``.grad`` and run :meth:`backward`, so that ``.grad`` holds this call's update and nothing else.

        What was in ``.grad`` stays in memory until the end, for the case that something raises; ``zero_grad`` before
        the call saves that memory.

        Args:
            objectives: one entry per task, as ``losses`` in :func:`gradkern.backward`; with ``compat`` none is None. Or
                a tensor (T,) that holds all losses. Through it every loss reaches all heads, most of them with zeros,
                so that heads count as shared parameters.
            retain_graph: True to keep the graphs for another backward pass. The originals always keep them.

        Returns:
            The step's losses, Gramian and weights.

        Raises:
            TypeError, ValueError: as :func:`gradkern.backward`. Then every ``.grad`` is as before, and also if a
                callable or a hook raises.
        """
        self._refuse_within_accumulate("pc_backward()")
        losses, params = listed("objectives", objectives), self._tensors()
        with Undo(grads_of(params, changed=False), scale_of(self._pending)):
            for p in params:
                p.grad = None
            with losses_named("objectives"):
                info = self.backward(losses, retain_graph=retain_graph)
            if self.compat == "original":
                for p in params:
                    if p.grad is None:
                        p.grad = torch.zeros_like(p)
        return info

    def init_group(self) -> None:
        """Clear every ``.grad``, as the method of pytorch_optimizer's class does."""
        self.zero_grad()

    def _options(self, **way: Unpack[WayArguments]) -> Options:
        options = super()._options(**way)
        return options if self.compat is None else replace(options, shared=self._tensors())

    def _grad_sink(self, source: Source, options: Options) -> Sink:
        if self.compat is None:
            return super()._grad_sink(source, options)
        if options.way.through != "rows":
            raise ValueError(f"through={options.way.through!r} has no rows, which compat={self.compat!r} combines")
        return _ReductionSink(self.reduction)

    def _update_sink(self, options: Options, step: tuple[Any, ...]) -> FusedAdamWSink | None:
        return super()._update_sink(options, step) if self.compat is None else None

    def __reduce__(self) -> tuple[Any, ...]:  # the arguments are not those of SurgeryOptimizer
        self._refuse_within_accumulate("a copy")
        return partial(type(self), compat=self.compat), (self.optimizer, self.reduction)

    def __repr__(self) -> str:
        return f"PCGrad({self.optimizer!r}, reduction={self.reduction!r}, compat={self.compat!r})"


class _AsPublished(aggregators.PCGrad):
    """PCGrad as both originals write it: each task shuffles the one list of all tasks, and visits all of it."""

    def _solve(self, M: Tensor, present: Tensor | None) -> Tensor:
        return torch.tensor([_coefficients(m) for m in M.tolist()], dtype=M.dtype, device=M.device)


def _coefficients(M: list[list[float]]) -> list[list[float]]:
    """Return the coefficients of the modified gradients in the original ones; row i is of task i."""
    tasks = range(len(M))
    order = list(tasks)
    C = []
    for i in tasks:
        c = [0.0] * len(M)
        c[i] = 1.0
        random.shuffle(order)
        for j in order:
            s = sum(c[k] * M[k][j] for k in tasks if c[k] != 0)
            if s < 0 < M[j][j]:
                c[j] -= s / M[j][j]
        C.append(c)
    return C


class _ReductionSink(GradSink):
    """Writes the combination to ``.grad``, reduced for parameters that all tasks reach and summed for all others."""

    needs_tensors = True
    takes_combination = False
    takes_rows = False

    def __init__(self, reduction: str) -> None:
        self.reduction = reduction

    def check(self, rows: StepRows) -> None:
        """Raise for an absent task."""
        assert isinstance(rows, Rows), "it needs tensors"
        for t, row in enumerate(rows.grads):
            if all(g is None for g in row):
                raise ValueError(f"objectives[{t}] must not be None: with compat, every task takes part in every step")

    def prepare(self, rows: StepRows | None, outcome: Outcome, targets: Targets) -> None:
        """Combine the rows. Parameters with a missing gradient count as unshared."""
        assert isinstance(rows, Rows), "it needs tensors"
        assert outcome.solution is not None, "PCGrad has weights"
        w = outcome.solution.weights
        summed = w[0] if self.reduction == "sum" else w.shape[-1] * w[0]
        by_reach = [
            c if len(c.tasks) == rows.n_tasks else c._replace(segment=None, unit=-1) for c in rows.arrangement.columns
        ]
        self._results, self._kept = rows.only(by_reach).combine(w, summed)

    def finish(self) -> None:
        """Call no hooks: post-accumulate hooks do not run in these modes."""

"""The sinks of a step, which take weights and write the update."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from gradkern.aggregators import Aggregator, Scalarization
from gradkern.gradients import graph
from gradkern.gradients.losses import Losses, unreached
from gradkern.gradients.param_grads import added, owned
from gradkern.gradients.parameters import Targets
from gradkern.step.flat_rows import StepRows
from gradkern.step.surgery import Outcome


class Sink(Protocol):
    """A sink. A step calls ``check``, ``prepare``, ``commit``, ``finish``, in this order.

    If one of the first three raises, the method, its modifiers and the memory are as before the step. After ``commit``
    the step counts, whatever ``finish`` does.

    A sink that needs no rows is not checked, and has none in ``prepare``.

    Attributes:
        needs_rows: whether it combines task gradients.
        needs_unshared: whether it needs dot products over unshared parameters too.
        needs_tensors: whether it needs each gradient as a tensor.
        takes_combination: whether it takes the combination itself, and not only the weights.
    """

    needs_rows: bool
    needs_unshared: bool
    needs_tensors: bool
    takes_combination: bool

    def check(self, rows: StepRows) -> None:
        """Raise unless it can take the rows."""

    def prepare(self, rows: StepRows | None, outcome: Outcome, targets: Targets) -> None:
        """Compute as much of the update as possible without writing."""

    def commit(self, step_scale: Tensor | None) -> Tensor | None:
        """Write the update: to ``.grad``, or to the parameters by an optimizer's step, scaled by κ.

        Returns:
            The share of entries that the mask kept, None without one.
        """

    def finish(self) -> None:
        """Run what belongs to the user and comes after the step."""


class GradSink:
    """Accumulates the combination into ``.grad``."""

    needs_rows = True
    needs_unshared = False
    needs_tensors = False
    takes_combination = True

    def check(self, rows: StepRows) -> None:
        """Accept all rows."""

    def prepare(self, rows: StepRows | None, outcome: Outcome, targets: Targets) -> None:
        """Combine the rows."""
        self._results, self._kept = outcome.combine()

    def commit(self, step_scale: Tensor | None) -> Tensor | None:
        """Write every ``.grad``."""
        write(self._results)
        return self._kept

    def finish(self) -> None:
        """Call the post-accumulate hooks."""
        call_hooks(self._results)


class WeightedBackwardSink:
    """Runs torch's own backward pass of Σ w_i L_i.

    Args:
        losses: the losses.
        method: the method that fixes their weights.
    """

    needs_rows = False
    needs_unshared = False
    needs_tensors = False
    takes_combination = False

    def __init__(self, losses: Losses, method: Aggregator) -> None:
        assert isinstance(method, Scalarization)
        self.losses = losses
        self.method = method

    def check(self, rows: StepRows) -> None:
        """Accept all rows: there are none."""

    def prepare(self, rows: StepRows | None, outcome: Outcome, targets: Targets) -> None:
        """Note the parameters."""
        self._targets = targets.tensors

    def commit(self, step_scale: Tensor | None) -> None:
        """Run the backward pass. Callables run one by one, so that only one graph is alive at a time."""
        weights = self.method.task_weights(len(self.losses.entries))
        if self.losses.one_graph_each and any(map(callable, self.losses.entries)):
            self._add_up_one_by_one(weights)
        else:
            self._backward_of_sum(weights)

    def finish(self) -> None:
        """Do nothing: torch's own backward pass has called the hooks."""

    def _add_up_one_by_one(self, weights: Sequence[float]) -> None:
        totals: list[Tensor | None] = [None] * len(self._targets)
        for _, grads in self.losses.weighted_passes(self._targets, weights):
            for k, g in enumerate(grads):
                if g is not None:
                    totals[k] = added(totals[k], g)
            del grads  # free them before the next task's pass
        with torch.no_grad():
            results = [(p, owned(g, p)) for p, g in zip(self._targets, totals, strict=True) if g is not None]
            write(results)
            call_hooks(results)

    def _backward_of_sum(self, weights: Sequence[float]) -> None:
        present = dict(self.losses.graphs())
        reachable = set(self._targets)
        for i, loss in present.items():
            graph.refuse_reentrant(f"losses[{i}]", loss)  # it would raise halfway
            if not any(leaf in reachable for leaf in graph.leaves(loss)):
                raise unreached(i)
        with torch.enable_grad():
            terms = [weights[i] * loss for i, loss in present.items()]
            total = sum(terms[1:], terms[0])
        torch.autograd.backward(total, inputs=self._targets, retain_graph=self.losses.retain_graph)


def write(results: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Accumulate each parameter's result into its ``.grad``, a dense one in place.

    All memory is there before the first ``.grad`` is written.
    """
    new, sparse, totals, terms = [], [], [], []
    for p, g in results:
        total = p.grad
        if total is None:
            new.append((p, g if g._base is None else g.detach()))  # autograd may return a view, and .grad must be none
        elif total.is_sparse:
            new.append((p, added(total, g)))
        elif g.is_sparse:
            sparse.append((total, g))
        else:
            totals.append(total)
            terms.append(g)
    for p, g in new:
        p.grad = g
    for total, g in sparse:
        total += g
    if totals:
        torch._foreach_add_(totals, terms)


def call_hooks(results: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Call the post-accumulate hooks of parameters that have got a result."""
    for p, _ in results:
        if hooks := getattr(p, "_post_accumulate_grad_hooks", None):
            for hook in list(hooks.values()):  # a hook may remove itself
                hook(p)

"""The sinks of a step, which take weights and write the update."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from gradkern.aggregators import Aggregator, Scalarization
from gradkern.gradients import graph
from gradkern.gradients.engine import raise_explained
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
        self._targets = targets

    def commit(self, step_scale: Tensor | None) -> None:
        """Run the backward pass. Callables run one by one, so that only one graph is alive at a time."""
        weights = self.method.task_weights(len(self.losses.entries))
        if self.losses.one_graph_each and self.losses.has_callables:
            self._add_up_one_by_one(weights)
        else:
            self._backward_of_sum(weights)

    def finish(self) -> None:
        """Do nothing: torch's own backward pass has called the hooks."""

    def _add_up_one_by_one(self, weights: Sequence[float]) -> None:
        tensors, thawed = self._targets.tensors, self.losses.frozen_grads
        totals: dict[Tensor, Tensor] = {}
        for i, grads in self.losses.weighted_passes(tensors, weights):
            for p, g in (*zip(tensors, grads, strict=True), *thawed.pop(i, {}).items()):
                if g is not None:
                    totals[p] = added(totals.get(p), g)
            del grads  # free them before the next task's pass
        targets = self._targets.as_now(totals.keys() - set(tensors))
        with torch.no_grad():
            results = [(p, owned(totals[p], p)) for p in targets.tensors if p in totals]
            write(results)
            call_hooks(results)

    def _backward_of_sum(self, weights: Sequence[float]) -> None:
        present: dict[int, Tensor] = {}
        for i, loss in self.losses.graphs():
            present[i] = loss
            if self.losses.has_callables:
                self._refuse_switches(i)
        reachable = set(self._targets.tensors)
        for i, loss in present.items():
            graph.refuse_reentrant(f"losses[{i}]", loss)  # it would raise halfway
            if not any(leaf in reachable for leaf in graph.leaves(loss)):
                raise unreached(i)
        with torch.enable_grad():
            terms = [weights[i] * loss for i, loss in present.items()]
            total = sum(terms[1:], terms[0])
        inputs = self._targets.tensors
        if self._targets.layouts.lazy:
            inputs = [p for p in inputs if not is_lazy(p)]
        try:
            torch.autograd.backward(total, inputs=inputs, retain_graph=self.losses.retain_graph)
        except RuntimeError as error:
            raise_explained("one of losses", present.values(), error)
            raise

    def _refuse_switches(self, i: int) -> None:
        """Raise ValueError if a callable, task ``i``'s, has switched a ``requires_grad``: one pass cannot follow it."""
        given, trained = self._targets.given, set(self._targets.tensors)
        for k, p in enumerate(given.tensors):
            if p.requires_grad != (p in trained):
                raise ValueError(
                    f"losses[{i}], a callable on features, has switched requires_grad of {given.name(k)}: leave "
                    f"features out, so that {self.method!r} takes the losses one by one"
                )


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

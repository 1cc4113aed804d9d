"""The sinks of a step, which take weights and write the update."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from gradkern.aggregators import Scalarization, Solution
from gradkern.aggregators.base import OwnGrads
from gradkern.aggregators.weightings.scalarization import Tasks
from gradkern.gradients import graph
from gradkern.gradients.engine import raise_explained
from gradkern.gradients.losses import Losses, stacked, unreached, unscaled
from gradkern.gradients.memory import bools_on
from gradkern.gradients.param_grads import added, owned
from gradkern.gradients.parameters import Targets
from gradkern.gradients.sharded import is_dtensor
from gradkern.step.step_rows import StepRows
from gradkern.step.surgery import Outcome, of_optimizer


class Sink(Protocol):
    """A sink. A step calls ``check``, ``prepare``, ``commit``, ``finish``, in this order.

    If one of the first three raises, the method, its modifiers and the memory are as before the step. After ``commit``
    the step counts, whatever ``finish`` does.

    A step whose sink is a :class:`WeightedBackwardSink` without rows calls ``weigh`` in place of the first two.

    Attributes:
        needs_tensors: whether it needs each gradient as a tensor.
        takes_combination: whether it takes the combination itself, and not only the weights.
        takes_rows: whether it takes this rank's rows of combined gradients that several ranks cut by rows.
    """

    @property
    def needs_unshared(self) -> bool:
        """Whether it needs dot products over unshared parameters too."""

    needs_tensors: bool
    takes_combination: bool
    takes_rows: bool

    @property
    def common(self) -> tuple[object, ...]:
        """What it has in common on all ranks, besides the options of the step: numbers and strings."""

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

    needs_unshared = False
    needs_tensors = False
    takes_combination = True
    takes_rows = False
    common: tuple[object, ...] = ()

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


class WeightedBackwardSink(GradSink):
    """Runs torch's own backward pass of Σ w_i L_i.

    Args:
        losses: the losses.
        method: the method that weighs them. If it needs the Gramian, the graphs are kept until this pass. Callables
            have none by then, so the update is the combination of their gradients.

    Attributes:
        needs_rows: whether the step has rows.
    """

    def __init__(self, losses: Losses, method: Scalarization) -> None:
        self.losses = losses
        self.method = method
        self.needs_rows = method.needs_gramian
        self._retain_graph = losses.retain_graph
        if method.needs_gramian:
            losses.retain_graph = True

    def weigh(self, targets: Targets, present: Sequence[bool]) -> Outcome:
        """Return the weights, after all losses have been computed, unless callables run one by one.

        Args:
            targets: the parameters.
            present: a flag for each task: whether any rank has a loss of it.
        """
        one_by_one = runs_one_by_one(self.losses, self.method)
        self._targets, self._told = targets, present
        self._present = None if one_by_one else self._graphs()
        tasks = self._tasks(known=not one_by_one)
        with torch.set_grad_enabled(False):  # three calls; no_grad makes seven
            w = tasks.among_present(self._weigh(tasks), 0.0)
        self._weights = self.method.multipliers(w)
        return Outcome(None, None, Solution(w.clone()), None, lambda: ([], None))

    def prepare(self, rows: StepRows | None, outcome: Outcome, targets: Targets) -> None:
        """Take the weights that the Gramian's step has found."""
        if self.losses.has_callables:
            super().prepare(rows, outcome, targets)
            return
        solution = outcome.solution
        assert solution is not None, "it is a scalarization's"
        assert solution.unshared is not None, "it is a scalarization's"
        self._targets, self._present = targets, self._graphs()
        self._weights = self.method.multipliers(solution.unshared)
        self._own = of_optimizer(self.method, solution.own, targets.tensors, self.losses.loss_scale)

    def commit(self, step_scale: Tensor | None) -> Tensor | None:
        """Run the backward pass. Callables run one by one if they can, so that only one graph is alive at a time."""
        if self.needs_rows and self.losses.has_callables:
            return super().commit(step_scale)
        if self._present is None:
            self._add_up_one_by_one()
            return None
        own = self._own if self.needs_rows else self._observed()
        self._backward_of_sum(self._present)
        if own:
            accumulate(own)
        return None

    def finish(self) -> None:
        """Call the hooks of a combination; those of torch's own backward pass have been called."""
        if self.needs_rows and self.losses.has_callables:
            super().finish()

    def _tasks(self, known: bool) -> Tasks:
        """Return what the method knows of the tasks; with ``known`` their losses too, if it needs them."""
        device, stack = self._targets.device, None
        if known and self.method.needs_losses:
            stack = unscaled(self.mean_losses(), self.losses).double()
        told = not self.method.has_fixed_weights and not all(self._told)
        present = bools_on(self._told, device) if told else None
        return Tasks(len(self._told), device, present, stack)

    def _weigh(self, tasks: Tasks) -> Tensor:
        return self.method.weigh(tasks)

    def mean_losses(self) -> Tensor:
        """Return the losses, (T,), means over the ranks; they have been computed."""
        return stacked(self.losses.values, self._targets.tensors[0])

    def _observed(self) -> OwnGrads:
        """Let the method see the losses; return the gradients of its own parameters."""
        if self.method.has_fixed_weights:
            return ()
        with torch.no_grad():
            own = self.method.observe(self._tasks(known=True))
        return of_optimizer(self.method, own, self._targets.tensors, self.losses.loss_scale)

    def _graphs(self) -> dict[int, Tensor]:
        """Run all callables; return the losses of present tasks, with their graphs."""
        present: dict[int, Tensor] = {}
        for i, loss in self.losses.graphs():
            present[i] = loss
            if self.losses.has_callables:
                self._refuse_switches(i)
        return present

    def _add_up_one_by_one(self) -> None:
        tensors, thawed = self._targets.tensors, self.losses.frozen_grads
        totals: dict[Tensor, Tensor] = {}
        for i, grads in self.losses.weighted_passes(tensors, self._weights):
            for p, g in (*zip(tensors, grads, strict=True), *thawed.pop(i, {}).items()):
                if g is not None:
                    totals[p] = added(totals.get(p), g)
            del grads  # free them before the next task's pass
        totals |= dict(self._observed())
        targets = self._targets.as_now(totals.keys() - set(tensors))
        with torch.no_grad():
            results = [(p, owned(totals[p], p)) for p in targets.tensors if p in totals]
        accumulate(results)

    def _sum(self, present: dict[int, Tensor]) -> Tensor:
        """Return the weighted sum of the losses; raise for graphs whose backward pass would raise halfway."""
        targets, reachable = self._targets, set(self._targets.tensors)
        for i, loss in present.items():
            graph.refuse_reentrant(f"losses[{i}]", loss)  # it would raise halfway
            if not (targets.has_dtensors or any(leaf in reachable for leaf in graph.leaves(loss))):
                raise unreached(i)
        with torch.enable_grad():
            terms = [self._weights[i] * loss for i, loss in present.items()]
            return sum(terms[1:], terms[0])

    def _backward_of_sum(self, present: dict[int, Tensor]) -> None:
        total = self._sum(present)
        inputs = self._targets.tensors
        if self._targets.layouts.lazy:
            inputs = [p for p in inputs if not is_lazy(p)]
        try:
            torch.autograd.backward(total, inputs=inputs, retain_graph=self._retain_graph)
        except RuntimeError as error:
            raise_explained("one of losses", present.values(), error)
            raise

    def _refuse_switches(self, i: int) -> None:
        """Raise ValueError if a callable, task ``i``'s, has switched a ``requires_grad``: one pass cannot follow it."""
        given, trained = self._targets.given, set(self._targets.tensors)
        where, remedy = " on features", f"leave features out, so that {self.method!r} takes the losses one by one"
        if self.method.weighs_known_losses:
            where, remedy = "", f"{self.method!r} needs all losses before its backward pass, so switch it before"
        for k, p in enumerate(given.tensors):
            if p.requires_grad != (p in trained):
                raise ValueError(
                    f"losses[{i}], a callable{where}, has switched requires_grad of {given.name(k)}: {remedy}"
                )


def runs_one_by_one(losses: Losses, method: Scalarization) -> bool:
    """Return whether a :class:`WeightedBackwardSink` runs callables one by one, and not before its backward pass."""
    return losses.one_graph_each and losses.has_callables and not method.weighs_known_losses


def accumulate(results: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Write results to ``.grad`` and call the hooks."""
    with torch.no_grad():
        write(results)
        call_hooks(results)


def write(results: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Accumulate each parameter's result into its ``.grad``, a dense one in place.

    All memory is there before the first ``.grad`` is written.
    """
    new, singly, totals, terms = [], [], [], []
    for p, g in results:
        total = p.grad
        if total is None:
            new.append((p, g if g._base is None else g.detach()))  # autograd may return a view, and .grad must be none
        elif total.is_sparse:
            new.append((p, added(total, g)))
        elif g.is_sparse or is_dtensor(g):  # foreach takes no tensors of several kinds
            singly.append((total, g))
        else:
            totals.append(total)
            terms.append(g)
    for p, g in new:
        p.grad = g
    for total, g in singly:
        total += g
    if totals:
        torch._foreach_add_(totals, terms)


def call_hooks(results: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Call the post-accumulate hooks of parameters that have got a result."""
    for p, _ in results:
        if hooks := getattr(p, "_post_accumulate_grad_hooks", None):
            for hook in list(hooks.values()):  # a hook may remove itself
                hook(p)

"""Losses in, ``.grad`` out: the task gradients of a step, their surgery, and the update.

Surgery writes nothing before it has computed everything, so a step that raises leaves every ``.grad`` as it was.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from gradkern.aggregators import Aggregator, Scalarization
from gradkern.gradients import graph
from gradkern.gradients.accumulation import Accumulation
from gradkern.gradients.features import Features, LossesOnFeatures
from gradkern.gradients.losses import Loss, Losses, Pass, stacked, unreached
from gradkern.gradients.memory import Memory, bools_on
from gradkern.gradients.parameters import Groups, Parameters, Params, parameters, segments, subset
from gradkern.info import SurgeryInfo
from gradkern.modifiers.conflict_lr import ConflictLR
from gradkern.modifiers.suppression import Mask, Suppression
from gradkern.step import rows
from gradkern.step.rows import Column
from gradkern.step.surgery import Outcome, solve


class TaskGradients(Protocol):
    """Where the task gradients of a step come from."""

    @property
    def present(self) -> list[bool]:
        """Which tasks have one."""

    def passes(self, targets: Sequence[Tensor]) -> Iterator[Pass]:
        """Each present task's number, its loss, detached, and its gradients, None for a target it does not reach."""


class OnePass(Protocol):
    """What takes a combination, in place of ``.grad``."""

    def check(self, columns: Sequence[Column]) -> None:
        """Raise unless it can take them."""

    def take(
        self, columns: Sequence[Column], outcome: Outcome, mask: Mask | None, step_scale: Tensor | None
    ) -> Tensor | None:
        """Take their combination, with κ; return the share of entries that the mask kept."""


def backward(
    losses: Sequence[Loss],
    params: Params,
    *,
    aggregator: Aggregator,
    groups: Groups = "model",
    shared: Params | None = None,
    suppression: Suppression | None = None,
    features: Features | None = None,
    batched: bool = False,
    retain_graph: bool = False,
) -> SurgeryInfo:
    """Compute the gradient of each loss, combine them by ``aggregator``, and accumulate the result into ``.grad``.

    Surgery is for parameters that at least two losses reach. A parameter that one loss reaches gets that loss's
    gradient as it is, and one that no loss reaches keeps its ``.grad``. ``Sum``, ``Mean`` and ``Constant`` are no
    surgery: they are torch's own backward pass of the weighted sum of the losses.

    Args:
        losses: T entries, a task's position being its identity. Each is a tensor of one element, or a callable that
            returns one, or None for a task absent in this step. Callables run once each, in order, with gradients
            enabled, and each one's graph is freed before the next runs, so that one task's activations are alive at
            a time; what autocast they need goes inside them.
        params: a Module, tensors, or (name, tensor) pairs: leaf tensors on one device; float32, float64, bfloat16 or
            float16, also mixed. Those that do not require grad are passed over.
        aggregator: the method, such as ``gradkern.PCGrad()``.
        groups: what has a Gramian, and weights, of its own: "model", all parameters together; "parameter", each;
            "module", each owning module's; or a function from a parameter's name to its group.
        shared: the parameters under surgery, some of ``params`` in any of its forms, in place of those that two
            losses reach. All others get the plain sum.
        suppression: drops entries of the result at random, under any ``aggregator``; the shared parameters' alone.
        features: a tensor, or several, through which alone losses reach the parameters below: the output of a trunk
            that the tasks share in one forward pass. The heads then go back to it first, each one's graph freed before
            the next, callables' too, and the trunk once per task. They can have no tensor hooks, nor retain_grad().
        batched: with ``features``, send all tasks through the trunk in one vectorized pass, which is faster where a
            task's own is too small for the device. Its operations must have rules for :func:`torch.func.vmap`, and a
            tensor's hook there sees all tasks' gradients at once.
        retain_graph: keep the graphs for another backward pass.

    Returns:
        The step's losses, Gramian and weights, as tensors that stay on the device.

    Raises:
        TypeError, ValueError: an argument is not as said above, a loss reaches none of ``params``, a graph holds
            reentrant checkpointing, or torch.distributed runs on more than one rank. No ``.grad`` has changed then,
            nor if a callable or a tensor's hook raises; but if torch's own backward pass of a weighted sum of tensors
            fails halfway, ``.grad`` is as that leaves it. Post-accumulate hooks run when all else is done.
    """
    return step(
        from_losses(losses, features, batched, retain_graph),
        params,
        aggregator=aggregator,
        groups=groups,
        shared=shared,
        suppression=suppression,
    )


def from_losses(
    losses: Sequence[Loss], features: Features | None, batched: bool, retain_graph: bool
) -> Callable[[torch.device], Losses]:
    """The task gradients of ``losses``, checked once their device is known; arguments as for :func:`backward`."""
    if features is not None:
        return partial(LossesOnFeatures, losses, features, batched, retain_graph)
    if batched:
        raise ValueError("batched=True needs features: what all tasks share, below which they can go together")
    return partial(Losses, losses, retain_graph)


def trained(given: Parameters) -> list[int]:
    """Which of the parameters are not frozen."""
    return [k for k, p in enumerate(given.tensors) if p.requires_grad]


def add_up(total: Accumulation, losses: Callable[[torch.device], Losses], params: Params) -> SurgeryInfo:
    """Add the task gradients of ``losses`` to ``total``, for a :func:`step` to come."""
    refuse_distributed()
    given = parameters(params)
    targets = [given.tensors[k] for k in trained(given)]
    return total.add(losses(targets[0].device), targets)


def step(
    source: Callable[[torch.device], TaskGradients],
    params: Params,
    *,
    aggregator: Aggregator,
    groups: Groups,
    shared: Params | None,
    suppression: Suppression | None,
    conflict_lr: ConflictLR | None = None,
    memory: Memory | None = None,
    one_pass: OnePass | None = None,
    outside: bool = False,
) -> SurgeryInfo:
    """:func:`backward`, and what only an optimizer can ask for.

    Args:
        source: gives the task gradients, once their device is known.
        params, aggregator, groups, shared, suppression: as for :func:`backward`.
        conflict_lr: tell κ in ``SurgeryInfo.step_scale``.
        memory: let absent tasks take part with their last gradients.
        one_pass: takes the combination, in place of ``.grad``.
        outside: take dot products outside surgery too, for ``one_pass`` to know.
    """
    refuse_distributed()
    if not isinstance(aggregator, Aggregator):
        raise TypeError(f"aggregator must be a gradkern.Aggregator, got {aggregator!r}")
    if suppression is not None and not isinstance(suppression, Suppression):
        raise TypeError(f"suppression must be a gradkern.Suppression or None, got {suppression!r}")
    given = parameters(params)
    numbers, n_segments = segments(given, groups)
    named_shared = None if shared is None else subset(shared, given)
    places = trained(given)
    targets = [given.tensors[k] for k in places]
    device = targets[0].device
    found = source(device)
    here = found.present
    if memory is not None:
        memory.check(len(here))
    if isinstance(found, Losses) and needs_no_rows(aggregator, suppression, conflict_lr):
        assert isinstance(aggregator, Scalarization)
        return _scalarize(found, targets, aggregator)

    values: list[Tensor | None] = [None] * len(here)
    grads: list[Sequence[Tensor | None]] = [[None] * len(targets) for _ in here]
    for i, value, row in found.passes(targets):
        values[i], grads[i] = value, rows.readable(row, targets)
    with torch.no_grad():
        present = None if memory is None or all(here) else bools_on(here, device)
        known = grads if memory is None else memory.recall(here, grads, targets)
        is_shared = _several_reach(known) if named_shared is None else [p in named_shared for p in targets]
        where = [numbers[k] if m else None for k, m in zip(places, is_shared, strict=True)]
        units = [-1] * len(numbers)
        if suppression is not None:
            units = suppression.first_units([p.numel() for p in given.tensors])
        # Outside surgery nothing is remembered: an absent task's head stays as it is.
        taken = [[known[t][n] if m else row[n] for n, m in enumerate(is_shared)] for t, row in enumerate(grads)]
        columns = rows.columns(targets, taken, where, [units[k] for k in places], overwrite=memory is None)
        if one_pass is not None:
            one_pass.check(columns)
        mask = None if suppression is None else suppression.mask(device)
        mask_of_products = mask if suppression is not None and suppression.scope == "all" else None
        outcome = solve(
            columns, n_segments, aggregator, present, mask_of_products, mask, outside, weights_only=one_pass is not None
        )
        step_scale = None if conflict_lr is None else conflict_lr.scale(outcome.gramian.sum(0))
        results, kept = outcome.combine() if one_pass is None else ([], None)
        written_to = _write(results)
        if memory is not None:
            memory.remember(here, grads, targets)
        try:
            if one_pass is not None:
                kept = one_pass.take(columns, outcome, mask, step_scale)
        finally:
            if mask is not None:
                mask.advance()
        _call_hooks(written_to)
        solution = outcome.solution
        alone = groups == "model"  # then there is no dimension of groups

        def told(value: Tensor | None) -> Tensor | None:
            return value[0] if alone and value is not None else value

        return SurgeryInfo(
            losses=stacked(values, targets[0]),
            gramian=told(outcome.gramian),
            weights=solution.weights[0] if alone else solution.weights,
            targets=told(solution.targets),
            attention=told(solution.attention),
            kept=kept,
            step_scale=step_scale,
        )


def needs_no_rows(aggregator: Aggregator, suppression: Suppression | None, conflict_lr: ConflictLR | None) -> bool:
    """Whether a step is torch's own backward pass of a weighted sum of losses."""
    return isinstance(aggregator, Scalarization) and suppression is None and conflict_lr is None


def _scalarize(losses: Losses, targets: list[Tensor], method: Scalarization) -> SurgeryInfo:
    """torch's own backward of Σ w_i L_i. Callables run, and are added up, one by one: one graph is alive at a time."""
    n_tasks = len(losses.present)
    weights = method.task_weights(n_tasks)
    values: list[Tensor | None] = [None] * n_tasks
    # On features, callables share a graph, which is freed when all are done.
    one_graph_each = any(map(callable, losses.entries)) and not isinstance(losses, LossesOnFeatures)
    if one_graph_each:
        totals: list[Tensor | None] = [None] * len(targets)
        for i, value, grads in losses.weighted_passes(targets, weights):
            values[i] = value
            for k, g in enumerate(grads):
                if g is not None:
                    totals[k] = rows.added(totals[k], g)
            del grads  # not alive beside the next task's
        with torch.no_grad():
            _call_hooks(_write((p, rows.owned(g, p)) for p, g in zip(targets, totals, strict=True) if g is not None))
    else:
        present = dict(losses.values())
        reachable = set(targets)
        graph.freeable(losses.entries)  # raises now for a graph that would raise halfway
        for i, loss in present.items():
            values[i] = loss.detach()
            if not any(leaf in reachable for leaf in graph.leaves(loss)):
                raise unreached(i)
        with torch.enable_grad():
            terms = [weights[i] * loss for i, loss in present.items()]
            total_loss = sum(terms[1:], terms[0])
        torch.autograd.backward(total_loss, inputs=targets, retain_graph=losses.retain_graph)
    w = method.weights_like(n_tasks, torch.float32, targets[0].device)
    return SurgeryInfo(stacked(values, targets[0]), None, w.clone())


def refuse_distributed() -> None:
    """Raise ValueError if torch.distributed runs on more than one rank."""
    d = torch.distributed
    if d.is_available() and d.is_initialized() and d.get_world_size() > 1:
        raise ValueError(
            f"torch.distributed runs on {d.get_world_size()} ranks: the gradient of one task goes past the all-reduce "
            "of DistributedDataParallel, so the ranks would drift apart. Gradient surgery works on one rank for now"
        )


def _several_reach(grads: Sequence[Sequence[Tensor | None]]) -> list[bool]:
    return [sum(g is not None for g in column) > 1 for column in zip(*grads, strict=True)]


def _write(results: Iterable[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Accumulate each parameter's result into its ``.grad`` in place; the parameters."""
    written = []
    for p, g in results:
        if p.grad is None:
            p.grad = g.detach()  # autograd hands out views of tensors of the same memory, which .grad is none of
        elif p.grad.is_sparse and not g.is_sparse:
            p.grad = rows.added(p.grad, g)
        else:
            p.grad += g
        written.append(p)
    return written


def _call_hooks(params: Sequence[Tensor]) -> None:
    """The post-accumulate hooks, which may raise: when the step is done, so that it is whole even then."""
    for p in params:
        for hook in list((getattr(p, "_post_accumulate_grad_hooks", None) or {}).values()):  # one may remove itself
            hook(p)

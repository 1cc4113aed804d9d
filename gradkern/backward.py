"""Losses in, ``.grad`` out: the task gradients of a step, their surgery, and the update.

Surgery writes nothing before it has computed everything, so a step that raises leaves every ``.grad`` as it was.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from gradkern import graph, rows
from gradkern.aggregators import Aggregator, Scalarization
from gradkern.conflict_lr import ConflictLR
from gradkern.info import SurgeryInfo
from gradkern.losses import Loss, checked, passes, stacked, unreached
from gradkern.memory import Memory, bools_on
from gradkern.parameters import Groups, Params, parameters, segments, subset
from gradkern.rows import Column
from gradkern.solve import Outcome, solve
from gradkern.suppression import Mask, Suppression


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
        losses,
        params,
        aggregator=aggregator,
        groups=groups,
        shared=shared,
        suppression=suppression,
        retain_graph=retain_graph,
    )


def step(
    losses: Sequence[Loss],
    params: Params,
    *,
    aggregator: Aggregator,
    groups: Groups,
    shared: Params | None,
    suppression: Suppression | None,
    retain_graph: bool,
    conflict_lr: ConflictLR | None = None,
    memory: Memory | None = None,
    one_pass: OnePass | None = None,
    outside: bool = False,
) -> SurgeryInfo:
    """:func:`backward`, and what only an optimizer can ask for.

    Args:
        losses, params, aggregator, groups, shared, suppression, retain_graph: as for :func:`backward`.
        conflict_lr: tell κ in ``SurgeryInfo.step_scale``.
        memory: let absent tasks take part with their last gradients.
        one_pass: takes the combination, in place of ``.grad``.
        outside: take dot products outside surgery too, for ``one_pass`` to know.
    """
    _refuse_distributed()
    if not isinstance(aggregator, Aggregator):
        raise TypeError(f"aggregator must be a gradkern.Aggregator, got {aggregator!r}")
    if suppression is not None and not isinstance(suppression, Suppression):
        raise TypeError(f"suppression must be a gradkern.Suppression or None, got {suppression!r}")
    given = parameters(params)
    numbers, n_segments = segments(given, groups)
    named_shared = None if shared is None else subset(shared, given)
    trained = [k for k, p in enumerate(given.tensors) if p.requires_grad]
    targets = [given.tensors[k] for k in trained]
    device = targets[0].device
    losses = checked(losses, device)
    if memory is not None:
        memory.check(len(losses))
    if isinstance(aggregator, Scalarization) and suppression is None and conflict_lr is None:
        return _scalarize(losses, targets, aggregator, retain_graph)

    values: list[Tensor | None] = [None] * len(losses)
    grads: list[Sequence[Tensor | None]] = [[None] * len(targets) for _ in losses]
    for i, value, found in passes(losses, targets, retain_graph):
        values[i], grads[i] = value, rows.readable(found, targets)
    with torch.no_grad():
        here = [loss is not None for loss in losses]
        present = None if memory is None or all(here) else bools_on(here, device)
        known = grads if memory is None else memory.recall(here, grads, targets)
        is_shared = _several_reach(known) if named_shared is None else [p in named_shared for p in targets]
        where = [numbers[k] if m else None for k, m in zip(trained, is_shared, strict=True)]
        units = [-1] * len(numbers)
        if suppression is not None:
            units = suppression.first_units([p.numel() for p in given.tensors])
        # Outside surgery nothing is remembered: an absent task's head stays as it is.
        taken = [[known[t][n] if m else row[n] for n, m in enumerate(is_shared)] for t, row in enumerate(grads)]
        columns = rows.columns(targets, taken, where, [units[k] for k in trained], overwrite=memory is None)
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


def _scalarize(losses: list[Loss], targets: list[Tensor], method: Scalarization, retain_graph: bool) -> SurgeryInfo:
    """torch's own backward of Σ w_i L_i. Callables run, and are added up, one by one: one graph is alive at a time."""
    weights = method.task_weights(len(losses))
    values: list[Tensor | None] = [loss.detach() if isinstance(loss, Tensor) else None for loss in losses]
    if any(callable(loss) for loss in losses):
        totals: list[Tensor | None] = [None] * len(targets)
        for i, value, grads in passes(losses, targets, retain_graph, weights):
            values[i] = value
            for k, g in enumerate(grads):
                if g is not None:
                    totals[k] = rows.added(totals[k], g)
            del grads  # not alive beside the next task's
        with torch.no_grad():
            _call_hooks(_write((p, rows.owned(g, p)) for p, g in zip(targets, totals, strict=True) if g is not None))
    else:
        present = {i: loss for i, loss in enumerate(losses) if isinstance(loss, Tensor)}
        reachable = set(targets)
        graph.freeable(losses)  # raises now for a graph that would raise halfway
        for i, loss in present.items():
            if not any(leaf in reachable for leaf in graph.leaves(loss)):
                raise unreached(i)
        with torch.enable_grad():
            terms = [weights[i] * loss for i, loss in present.items()]
            total_loss = sum(terms[1:], terms[0])
        torch.autograd.backward(total_loss, inputs=targets, retain_graph=retain_graph)
    w = method.weights_like(len(losses), torch.float32, targets[0].device)
    return SurgeryInfo(stacked(values, targets[0]), None, w.clone())


def _refuse_distributed() -> None:
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

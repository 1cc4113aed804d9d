"""The first half of a step through activations: it walks the graphs of the losses, and adds up the Gramian."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradkern.gradients.activations.factors import Factors, Found, weights_of
from gradkern.gradients.activations.graphs import Graphs
from gradkern.gradients.layouts import Row
from gradkern.gradients.losses import Losses
from gradkern.gradients.memory import bools_on
from gradkern.gradients.param_grads import readable
from gradkern.gradients.parameters import Targets
from gradkern.gradients.plan import Arrangement
from gradkern.step.activation_rows import ActivationRows, KeptRows
from gradkern.step.gather import losses_of, of_one_kind, tells_absent, units_of
from gradkern.step.gramians import Gramians
from gradkern.step.options import Options
from gradkern.step.rows import Rows


def through_activations(source: Losses, targets: Targets, options: Options) -> ActivationRows:
    """Return what a step needs of its task gradients; most of these are not made.

    Args:
        source: the losses, opened: tensors of one forward pass.
        targets: the parameters.
        options: the method and its modifiers.
    """
    graphs = Graphs(source, targets)
    with torch.no_grad():
        if options.way.finish == "kept":
            return _kept(graphs, source, targets, options)
        return _streamed(graphs, source, targets, options)


def _streamed(graphs: Graphs, source: Losses, targets: Targets, options: Options) -> ActivationRows:
    """Add up the Gramian while the gradients pass, and keep none of them."""
    shared = shared_by_losses(graphs.tasks, targets)
    gramians = Gramians(targets, shared, graphs.n_tasks, options.way.gramian)
    factors = Factors(graphs, targets, weights_of(graphs, shared), shared, is_cut=True)
    for found in factors.run(retain_graph=True):
        if is_under_surgery(found, targets):
            gramians.add(found)
    of_step = _of_step(source, targets, options)
    return ActivationRows(targets.tensors, graphs, reached(graphs, targets), gramians.M, gramians.exact, **of_step)


def _kept(graphs: Graphs, source: Losses, targets: Targets, options: Options) -> KeptRows:
    """Keep what passes through layers of all tasks, and the rows of other parameters."""
    T, sketch = graphs.n_tasks, options.way.gramian
    shared = shared_or_named(graphs.tasks, targets)
    weights = [w for w in weights_of(graphs, shared) if w.is_cheaper_without_rows(T, sketch)]
    factors = Factors(graphs, targets, weights, range(len(targets.tensors)), is_cut=False)
    kept, rows = factors_and_rows(factors.run(source.retain_graph), T, targets)
    reach = [list(targets.layouts.reach_of(row)) for row in rows]
    for found in kept:
        for t in found.tasks:
            reach[t][found.place] = torch.strided
    arrangement = targets.arranged(tuple(map(tuple, reach)), None, units_of(options, targets))
    of_kept = {found.place for found in kept}
    own = arrangement.of(c for c in arrangement.columns if c.place not in of_kept)
    of_others = Rows(targets.tensors, of_one_kind(rows, arrangement, targets), own, overwrite=True)
    gramians = Gramians(targets, shared, T, sketch)
    gramians.add_products(of_others.gramian(False))
    for found in kept:
        if is_under_surgery(found, targets):
            gramians.add(found)
    return KeptRows(
        targets.tensors,
        graphs,
        arrangement,
        gramians.M,
        gramians.exact,
        **_of_step(source, targets, options),
        mask=None if options.suppression is None else options.suppression.mask(targets.device),
        factors=[(found.weight, found.passed) for found in kept if found.weight is not None],
        rows=of_others,
    )


def factors_and_rows(found: Iterable[Found], n_tasks: int, targets: Targets) -> tuple[list[Found], list[Row]]:
    """Return the weights that any task reaches, and T rows of the other parameters' gradients."""
    kept: list[Found] = []
    rows: list[list[Tensor | None]] = [[None] * len(targets.tensors) for _ in range(n_tasks)]
    for one in found:
        if one.weight is None:
            for row, g in zip(rows, one.rows[0], strict=True):
                row[one.place] = g
        elif one.passed:
            kept.append(one)
    return kept, [readable(row, targets.tensors, targets.layouts) for row in rows]


def is_under_surgery(found: Found, targets: Targets) -> bool:
    """Return whether a parameter counts: two tasks have a gradient of it, or it is named and one has."""
    return len(found.tasks) > (1 if targets.named is None else 0)


def shared_or_named(tasks: Sequence[Sequence[int]], targets: Targets) -> list[int]:
    """Return the places of the parameters that the user has named, or that two losses reach.

    Args:
        tasks: for each parameter, the tasks that reach it.
        targets: the parameters.
    """
    if targets.named is not None:
        return [k for k, is_named in enumerate(targets.named) if is_named and tasks[k]]
    return [k for k, reaching in enumerate(tasks) if len(reaching) > 1]


def shared_by_losses(tasks: Sequence[Sequence[int]], targets: Targets) -> list[int]:
    """Return the places of the parameters that two losses reach; arguments are as for :func:`shared_or_named`.

    Raises:
        ValueError: the user has named others.
    """
    shared = [k for k, reaching in enumerate(tasks) if len(reaching) > 1]
    if shared_or_named(tasks, targets) != shared:
        raise ValueError(
            "shared must be the parameters that two losses reach, or be left out, with through='activations' and "
            "finish='backward', whose one backward pass has one weight for all that tasks share: give finish='kept'"
        )
    return shared


def reached(graphs: Graphs, targets: Targets) -> Arrangement:
    """Return the arrangement of the gradients that backward passes would give."""
    reach = [[torch.strided if t in tasks else None for tasks in graphs.tasks] for t in range(graphs.n_tasks)]
    return targets.arranged(tuple(map(tuple, reach)), None, None)


def _of_step(source: Losses, targets: Targets, options: Options) -> dict[str, Any]:
    """Return what a method needs besides the Gramian."""
    told = tells_absent(source.present, options)
    return {
        "n_tasks": len(source.present),
        "present": bools_on(source.present, targets.device) if told else None,
        "losses": losses_of(source, targets, options),
        "loss_scale": source.loss_scale,
    }

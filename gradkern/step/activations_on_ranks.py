"""The first half of a step through activations on several ranks.

Before any pass the ranks agree on which tasks reach which parameters on any of them, and on the order in which they
exchange gradients. A rank that raises after that sends zeros for the rest, so that no other waits for it.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from gradkern.distributed.agreement import digest, together
from gradkern.distributed.gathered import leaves_of
from gradkern.gradients.activations.factors import Factors, Found, weights_of
from gradkern.gradients.activations.graphs import Graphs
from gradkern.gradients.activations.products import Weight
from gradkern.gradients.layouts import layouts_of
from gradkern.gradients.losses import Losses, unscaled
from gradkern.gradients.memory import bools_on
from gradkern.gradients.parameters import Targets
from gradkern.gradients.plan import Arrangement
from gradkern.step.activation_rows import ActivationRows
from gradkern.step.begin import Start
from gradkern.step.gather import tells_absent, units_of
from gradkern.step.mean_gramians import MeanGramians
from gradkern.step.mean_kept_rows import MeanKeptRows
from gradkern.step.on_ranks import mean_losses, refuse_sparse, united
from gradkern.step.options import Options
from gradkern.step.rows import Rows
from gradkern.step.through_activations import factors_and_rows, shared_by_losses, shared_or_named


class _Search(NamedTuple):
    """The results of a rank's search of its losses' graphs.

    Attributes:
        weights: the parameters that have factors, by place.
        factors: the passes.
        sequence: the places of parameters under surgery in the order in which the passes find them.
    """

    weights: dict[int, Weight]
    factors: Factors
    sequence: list[int]


def activations_on_ranks(source: Losses, options: Options, begun: Start) -> ActivationRows:
    """Return what :func:`gradkern.step.through_activations.through_activations` returns, of the mean gradients.

    Args:
        source: the losses, opened.
        options: the method and its modifiers.
        begun: what the ranks have agreed on.
    """
    comm, targets, present, _, _ = begun
    is_kept, T = options.way.finish == "kept", len(present)
    leaves = leaves_of(targets.tensors, targets.device, targets.name)
    graphs, of_ranks = together(
        comm, lambda: Graphs(source, targets, leaves), lambda found: {"reach": digest("reach", *_reached(found))}
    )
    reach = united(comm, _reached(graphs), of_ranks)
    arrangement = targets.arranged(reach, None, units_of(options, targets))
    tasks = [[t for t, kind in enumerate(kinds) if kind is not None] for kinds in zip(*reach, strict=True)]
    shared = shared_or_named(tasks, targets) if is_kept else shared_by_losses(tasks, targets)
    search, _ = together(
        comm, lambda: _searched(graphs, targets, shared, is_kept), lambda s: _facts(s, graphs, targets)
    )
    gramians = MeanGramians(targets, layouts_of(leaves), search.weights, search.sequence, T, options.way.gramian, comm)

    with torch.no_grad():
        passes: Iterable[Found] = search.factors.run(source.retain_graph)
        if targets.has_dtensors:  # here a rank that raises does so at once, as in agreed_reach
            passes = list(passes)

    def walk() -> dict[str, Any]:
        try:
            if is_kept:
                return _kept(gramians.adding(passes), arrangement, T, targets)
            for _ in gramians.adding(passes):
                pass
        except Exception:
            gramians.add_zeros()
            raise
        return {}

    with torch.no_grad():
        kept, _ = together(comm, walk, lambda _: {})
        products, exact = gramians.totals()
        given: dict[str, Any] = {
            "params": targets.tensors,
            "graphs": graphs,
            "arrangement": arrangement,
            "products": products,
            "exact": exact,
            "n_tasks": T,
            "mask": None if options.suppression is None else options.suppression.mask(targets.device),
            "present": bools_on(present, targets.device) if tells_absent(present, options) else None,
            "losses": unscaled(mean_losses(comm, source.values, present, targets), source),
            "loss_scale": source.loss_scale,
        }
        return MeanKeptRows(**given, **kept, comm=comm, targets=targets) if is_kept else ActivationRows(**given)


def _reached(graphs: Graphs) -> list[tuple[bool, ...]]:
    """Return for each task and parameter whether the task reaches it on this rank."""
    return [tuple([t in tasks for tasks in graphs.tasks]) for t in range(graphs.n_tasks)]


def _searched(graphs: Graphs, targets: Targets, shared: Sequence[int], is_kept: bool) -> _Search:
    """Return what this rank has of the parameters under surgery.

    Which of them have factors does not depend on the number of tokens, which may differ from rank to rank. A graph
    through ``fully_shard`` is not cut: at the end of each pass it may free weights that the next segment reads.
    """
    weights = weights_of(graphs, shared)
    wanted = range(len(targets.tensors)) if is_kept else shared
    factors = Factors(graphs, targets, weights, wanted, is_cut=not is_kept and not targets.has_dtensors)
    under_surgery = frozenset(shared)
    sequence = [k for k in factors.sequence if k in under_surgery]
    return _Search({weight.place: weight for weight in weights}, factors, sequence)


def _facts(search: _Search, graphs: Graphs, targets: Targets) -> dict[str, int]:
    sizes = [(k, w.layers[0].p, str(w.layers[0].kind) if w.is_sketchable else "") for k, w in search.weights.items()]
    # The passes of all ranks wait for each other's where weights are gathered.
    tasks = tuple(map(tuple, graphs.tasks)) if targets.has_dtensors else ()
    return {"layers": digest("layers", tuple(search.sequence), tuple(sizes), tasks)}


def _kept(found: Iterable[Found], arrangement: Arrangement, n_tasks: int, targets: Targets) -> dict[str, Any]:
    """Return what this rank combines, by the names of the attributes of :class:`KeptRows`."""
    kept, rows = factors_and_rows(found, n_tasks, targets)
    for t, row in enumerate(rows):
        refuse_sparse(t, row, targets)
    shared = {c.place for c in arrangement.shared}
    flags = tuple([k in shared for k in range(len(targets.tensors))])
    own = targets.arranged(tuple(map(targets.layouts.reach_of, rows)), flags, None)
    return {
        "factors": [(one.weight, one.passed) for one in kept],
        "rows": Rows(targets.tensors, rows, own, overwrite=True),
    }

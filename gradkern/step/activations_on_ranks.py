"""The first half of a step through activations on several ranks."""

from typing import NamedTuple

import torch

from gradkern.distributed.agreement import digest, together
from gradkern.gradients.activations.factors import Factors, weights_of
from gradkern.gradients.activations.graphs import Graphs
from gradkern.gradients.activations.products import Weight
from gradkern.gradients.losses import Losses, unscaled
from gradkern.gradients.memory import bools_on
from gradkern.gradients.parameters import Targets
from gradkern.step.activation_rows import ActivationRows
from gradkern.step.begin import Start
from gradkern.step.gather import tells_absent
from gradkern.step.mean_gramians import MeanGramians
from gradkern.step.on_ranks import mean_losses
from gradkern.step.options import Options
from gradkern.step.through_activations import reached, shared_by_losses


class _Search(NamedTuple):
    """What a rank has found in the graphs of its losses.

    Attributes:
        graphs: the graphs.
        weights: the parameters that have factors, by place.
        factors: the passes.
    """

    graphs: Graphs
    weights: dict[int, Weight]
    factors: Factors


def activations_on_ranks(source: Losses, options: Options, begun: Start) -> ActivationRows:
    """Return what :func:`gradkern.step.through_activations.through_activations` returns, of the mean gradients.

    Args:
        source: the losses, opened.
        options: the method and its modifiers.
        begun: what the ranks have agreed on.
    """
    comm, targets, present, _, _ = begun
    search, _ = together(comm, lambda: _searched(source, targets), _facts)
    graphs = search.graphs
    gramians = MeanGramians(targets, search.weights, search.factors.sequence, graphs.n_tasks, options.way.gramian, comm)

    def walk() -> None:
        try:
            for found in search.factors.run(retain_graph=True):
                gramians.add(found)
        except Exception:
            gramians.add_zeros()
            raise

    with torch.no_grad():
        together(comm, walk, lambda _: {})
        return ActivationRows(
            targets.tensors,
            graphs,
            reached(graphs, targets),
            gramians.total(),
            None,
            n_tasks=graphs.n_tasks,
            present=bools_on(present, targets.device) if tells_absent(present, options) else None,
            losses=unscaled(mean_losses(comm, source.values, present, targets), source),
            loss_scale=source.loss_scale,
        )


def _searched(source: Losses, targets: Targets) -> _Search:
    graphs = Graphs(source, targets)
    shared = shared_by_losses(graphs, targets)
    weights = weights_of(graphs, targets, shared)
    factors = Factors(graphs, targets, weights, shared, is_cut=True)
    return _Search(graphs, {weight.place: weight for weight in weights}, factors)


def _facts(search: _Search) -> dict[str, int]:
    sizes = [(k, w.layers[0].p, w.has_inputs, w.is_embedding) for k, w in search.weights.items()]
    return {"layers": digest("layers", tuple(search.factors.sequence), tuple(sizes))}

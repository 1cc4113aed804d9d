"""The ways from a batch to ``.grad``: the forward pass that all tasks share, and what follows it.

All do UPGrad of the sum of the losses. It draws nothing, so that ways which are exact give the same update.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

import gradkern as gk
from bench.peers import TORCHJD, Peers
from bench.step.shared import libmtl
from bench.step.shared.models import Shared

PLAIN, ROWS = "plain", "rows"
COLUMNS = (16, 64)
"""Columns of the sketches."""


class Way(NamedTuple):
    """A way to take a step of a model.

    Attributes:
        model: the model.
        backward: runs forward and backward passes, and writes ``.grad`` of the model's parameters.
        exact: whether its surgery is that of the trunk's gradients, and not of a sketch or of the features' gradients.
    """

    model: Shared
    backward: Callable[[], object]
    exact: bool = True

    def __call__(self) -> None:
        """Take the step, and leave no ``.grad``, so that all ways start with the same memory."""
        self.backward()
        self.model.zero_grad()


def ways(model: Shared, peers: Peers) -> dict[str, Way]:
    """Return the ways by name: that without surgery first, then ours, those after LibMTL, and those of TorchJD.

    Args:
        model: model whose step they take.
        peers: peers to compare with.
    """
    method = gk.UPGrad(preference=torch.ones(len(model.heads)))
    label = f"after LibMTL {libmtl.VERSION}, rep_grad="
    found = {
        PLAIN: Way(model, lambda: sum(model().losses).backward()),
        ROWS: Way(model, partial(_surgery, model, method)),
        "rows, features=": Way(model, partial(_by_features, model, method)),
        "rows, features=, batched": Way(model, partial(_by_features, model, method, batched=True)),
    }
    for finish in ("backward", "kept"):
        way: dict[str, Any] = {"through": "activations", "finish": finish}
        found[f"activations, {finish}"] = Way(model, partial(_surgery, model, method, **way))
        for k in COLUMNS:
            sketched = partial(_surgery, model, method, gramian=gk.Sketch(k), **way)
            found[f"activations, {finish}, Sketch({k})"] = Way(model, sketched, exact=False)
    for name, per_example in (("features, summed", False), ("features, per example", True)):
        by_features = partial(_by_features, model, method, through="features", per_example=per_example)
        found[name] = Way(model, by_features, exact=False)
    found[f"{label}False"] = Way(model, partial(libmtl.by_parameters, model, method.weights))
    found[f"{label}True"] = Way(model, partial(libmtl.by_features, model, method.weights), exact=False)
    if TORCHJD in peers.found:
        found |= {f"{TORCHJD} autojac": _autojac(model), f"{TORCHJD} autogram": _autogram(model)}
    return found


def _surgery(model: Shared, method: gk.UPGrad, **way: Any) -> None:
    gk.backward(model().losses, model, aggregator=method, **way)


def _by_features(model: Shared, method: gk.UPGrad, **way: Any) -> None:
    h, losses = model()
    gk.backward(losses, model, aggregator=method, features=h, **way)


def _autojac(model: Shared) -> Way:
    """Return TorchJD's step by explicit gradients. They are computed one at a time, which is faster on a CPU."""
    from torchjd.aggregation import UPGrad
    from torchjd.autojac import jac_to_grad, mtl_backward

    aggregator = UPGrad(torch.ones(len(model.heads)))

    def backward() -> None:
        h, losses = model()
        mtl_backward(losses, features=h, parallel_chunk_size=1)
        jac_to_grad(model.trunk.parameters(), aggregator)

    return Way(model, backward)


def _autogram(model: Shared) -> Way:
    """Return TorchJD's step by the Gramian alone, on a copy of the model, in which the engine leaves hooks.

    The losses are means over the batch, so that the engine is told of no dimension of examples.
    """
    from torchjd.aggregation import UPGradWeighting
    from torchjd.autogram import Engine

    own = copy.deepcopy(model)
    engine, weighting = Engine(own.trunk, batch_dim=None), UPGradWeighting(torch.ones(len(model.heads)))

    def backward() -> None:
        losses = torch.stack(own().losses)
        losses.backward(weighting(engine.compute_gramian(losses)))

    return Way(own, backward)

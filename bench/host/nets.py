"""Whole steps of small nets, whose tasks are terms of a loss on one forward pass, as those of a PINN are.

The time of a call starts after the forward pass, which all contestants share.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import gradkern as gk
from bench import naive
from bench.host.rounds import interleaved
from bench.measure import quantiles, ratio
from bench.peers import TORCHJD, Peers

BATCH, INPUTS = 32, 2
LR = 1e-5
PASSES, USUAL, OURS = "backward passes alone", "usual loop", "PCGrad"
GRADVAC, PER_PARAMETER = "GradVac", "PCGrad per parameter"
UPDATE, USUAL_UPDATE = "update", "usual loop and torch's AdamW"
Backward = Callable[[list[Tensor]], object]


class Net(NamedTuple):
    """A net of linear layers with tanh between them, and its number of tasks."""

    T: int
    layers: int
    width: int

    def make(self) -> nn.Sequential:
        """Return the net with new random weights; it has one output."""
        sizes = [INPUTS, *[self.width] * (self.layers - 1), 1]
        made: list[nn.Module] = []
        for into, out in pairwise(sizes):
            made += [nn.Linear(into, out), nn.Tanh()]
        return nn.Sequential(*made[:-1])


NETS = (Net(2, 8, 50), Net(3, 8, 50), Net(8, 8, 50), Net(3, 8, 20), Net(3, 4, 128), Net(3, 20, 64), Net(3, 8, 350))


def contestants(params: list[nn.Parameter], peers: Peers) -> dict[str, Backward]:
    """Return the contestants by name. All but two fill ``.grad``, and two also step the parameters.

    Args:
        params: parameters, which have no ``.grad`` before a call.
        peers: peers to compare with.
    """
    pcgrad, gradvac = gk.PCGrad(), gk.GradVac()
    opt = gk.SurgeryOptimizer(gk.optim.AdamW(params, LR), gk.PCGrad())
    adamw = torch.optim.AdamW(params, LR, fused=True)

    def passes(losses: list[Tensor]) -> list[tuple[Tensor, ...]]:
        last = len(losses) - 1
        return [torch.autograd.grad(loss, params, retain_graph=t < last) for t, loss in enumerate(losses)]

    def usual(losses: list[Tensor]) -> None:
        results = naive.surgery(passes(losses), [range(len(params))], 0.0)
        for p, g in zip(params, results, strict=True):
            p.grad = g

    def usual_update(losses: list[Tensor]) -> None:
        usual(losses)
        adamw.step()

    found: dict[str, Backward] = {
        PASSES: passes,
        USUAL: usual,
        OURS: lambda losses: gk.backward(losses, params, aggregator=pcgrad),
        GRADVAC: lambda losses: gk.backward(losses, params, aggregator=gradvac),
        PER_PARAMETER: lambda losses: gk.backward(losses, params, aggregator=pcgrad, groups="parameter"),
        UPDATE: opt.update,
        USUAL_UPDATE: usual_update,
    }
    if TORCHJD in peers.found:
        found[TORCHJD] = _torchjd(params)
    return found


def _torchjd(params: list[nn.Parameter]) -> Backward:
    """Return TorchJD's step, which differentiates all losses in one batched pass.

    A pass for each task (``parallel_chunk_size=1``) takes longer from three tasks on.
    """
    from torchjd.aggregation import PCGrad
    from torchjd.autojac import jac, jac_to_grad

    aggregator = PCGrad()

    def backward(losses: list[Tensor]) -> None:
        for p, rows in zip(params, jac(losses, params), strict=True):
            p.jac = rows
        jac_to_grad(params, aggregator)

    return backward


def measured(net: Net, peers: Peers, seconds: float) -> dict[str, Any]:
    """Return a row of raw results: times, ratios round by round, and times beyond those of the passes.

    Args:
        net: the net.
        peers: peers to compare with.
        seconds: approximate time for all contestants.
    """
    model = net.make()
    params = list(model.parameters())
    x, labels = torch.randn(BATCH, INPUTS), torch.randn(net.T, BATCH, 1)

    def losses() -> list[Tensor]:
        for p in params:
            p.grad = None
        o = model(x)
        return [(o - y).pow(2).mean() for y in labels]

    times = interleaved(contestants(params, peers), losses, seconds)
    passes = times[PASSES]
    return {
        "T": net.T,
        "tensors": len(params),
        "numbers": sum(p.numel() for p in params),
        "rounds": len(passes),
        "seconds": {name: quantiles(of) for name, of in times.items()},
        "of PCGrad": {name: ratio(of, times[OURS]) for name, of in times.items()},
        "of update": {USUAL_UPDATE: ratio(times[USUAL_UPDATE], times[UPDATE])},
        "beyond the passes": {
            name: quantiles([a - b for a, b in zip(of, passes, strict=True)]) for name, of in times.items()
        },
    }

"""Who takes part in a case: by name, calls that do the same work. All have a copy of the input beside them."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any
from unittest.mock import patch

import torch

import gradkern as gk
from bench import naive, plain
from bench.cases import NETWORK, VARIANTS
from bench.floors import COPY, ENTRIES
from bench.inputs import Inputs
from bench.peers import COMPILE, PYTORCH_OPTIMIZER, TORCHJD, Peers, compiled
from gradkern.aggregators.methods import METHODS, Method
from gradkern.kernels import settings
from gradkern.optim.adamw import Combination
from gradkern.step import rows
from gradkern.step.rows import Column
from gradkern.step.surgery import solve

OURS, ONE_LAUNCH, NAIVE, MATMUL, FOREACH = "gradkern", "one launch", "naive", "matmul", "foreach"
NAMES = (OURS, ONE_LAUNCH, NAIVE, MATMUL, FOREACH, COMPILE, TORCHJD, PYTORCH_OPTIMIZER, COPY)

ops = torch.ops.gradkern
Run = Callable[[], Any]
Runs = dict[str, Run]


def contestants(x: Inputs, peers: Peers) -> Runs:
    """Those of ``x.case``, with the peers found. Nothing is computed, nor allocated, before a call."""
    return OPERATIONS[x.case.operation](x, peers) | {COPY: lambda: torch._foreach_copy_(x.target, x.source)}


def gramian(x: Inputs, peers: Peers) -> Runs:
    """M = J Jᵀ."""
    runs: Runs = {OURS: lambda: gk.gramian(x.J), NAIVE: lambda: naive.gramian(x.rows)}
    return runs | _plain(peers, plain.gramian, lambda: (x.J,))


def combine(x: Inputs, peers: Peers) -> Runs:
    """wᵀ J."""
    runs: Runs = {OURS: lambda: gk.combine(x.J, x.w), NAIVE: lambda: naive.combine(x.rows, x.w)}
    return runs | _plain(peers, plain.combine, lambda: (x.J, x.w))


def project(x: Inputs, peers: Peers) -> Runs:
    """W J."""
    runs: Runs = {OURS: lambda: gk.project(x.J, x.W), NAIVE: lambda: naive.project(x.rows, x.W)}
    return runs | _plain(peers, plain.project, lambda: (x.J, x.W))


def pcgrad(x: Inputs, peers: Peers) -> Runs:
    """The whole surgery of a matrix."""
    aggregator = gk.PCGrad()
    runs: Runs = {OURS: lambda: aggregator(x.J), NAIVE: lambda: naive.pcgrad(x.rows)}
    runs |= _one_launch(x, runs[OURS])
    runs |= _plain(peers, plain.pcgrad, lambda: (x.J,))
    if TORCHJD in peers.found:
        from torchjd.aggregation import PCGrad

        theirs = PCGrad()
        runs[TORCHJD] = lambda: theirs(x.J)
    if PYTORCH_OPTIMIZER in peers.found:
        runs[PYTORCH_OPTIMIZER] = _pytorch_optimizer(x)
    return runs


def gradvac(x: Inputs, peers: Peers) -> Runs:
    """The whole surgery, by GradVac."""
    aggregator = gk.GradVac()
    runs: Runs = {OURS: lambda: aggregator(x.J)}
    if TORCHJD in peers.found:
        from torchjd.aggregation import GradVac

        theirs = GradVac(beta=aggregator.beta)
        runs[TORCHJD] = lambda: theirs(x.J)
    return runs


@dataclass(frozen=True)
class Alone:
    """The whole surgery by a method that nobody else has; GradAttention's network learns a step by it."""

    method: Method

    def __call__(self, x: Inputs, peers: Peers) -> Runs:
        """Ours alone."""
        aggregator = self.method.make()
        return {OURS: lambda: aggregator(x.J)}


def surgery(x: Inputs, peers: Peers) -> Runs:
    """What a step does with the gradients that autograd left. It may overwrite them, so ours works on the copy."""
    aggregator, n = gk.PCGrad(), len(x.shapes)

    @torch.no_grad()
    def ours() -> Any:
        left = [rows.readable(x.target[k : k + n], x.params) for k in range(0, len(x.target), n)]
        if x.suppression is None:
            columns = rows.columns(x.params, left, x.segments, [-1] * n, overwrite=True)
            return solve(columns, len(x.groups), aggregator, None, None, None).combine()
        columns = rows.columns(x.params, left, x.segments, x.suppression.first_units(x.numels), overwrite=True)
        mask = x.suppression.mask(x.device)
        of_products = mask if x.case.scope == "all" else None
        results = solve(columns, len(x.groups), aggregator, None, of_products, mask).combine()
        mask.advance()
        return results

    return {OURS: ours, NAIVE: lambda: naive.surgery(x.grads, x.groups, x.case.p)} | _one_launch(x, ours)


def adamw(x: Inputs, peers: Peers) -> Runs:
    """A step along Σ_t w_t g_t. All move the same parameters; of 16-bit ones only ours keeps moments in float32."""

    @cache
    def optimizer() -> gk.optim.AdamW:
        return gk.optim.AdamW(x.stepped)

    @cache
    def columns() -> list[Column]:
        units = [-1] * len(x.shapes) if x.suppression is None else x.suppression.first_units(x.numels)
        return rows.columns(x.stepped, x.grads, x.segments, units, overwrite=False)

    def ours() -> None:
        mask = None if x.suppression is None else x.suppression.mask(x.device)
        optimizer().combination = Combination(columns(), x.weights, mask)
        optimizer().step()
        if mask is not None:
            mask.advance()

    return {
        OURS: ours,
        NAIVE: _by_grad(x, naive.combined, fused=True),
        FOREACH: _by_grad(x, plain.combined, foreach=True),
    }


def gather(x: Inputs, peers: Peers) -> Runs:
    """The entries that GradAttention looks at."""
    return {
        OURS: lambda: ops.gather([g for row in x.grads for g in row], x.numels, x.index),
        NAIVE: lambda: naive.gather(x.grads, x.index),
    }


def scatter(x: Inputs, peers: Peers) -> Runs:
    """The entries of an update that only some have, put into tensors."""
    n = len(x.shapes)
    return {
        OURS: lambda: ops.scatter(x.values, x.numels, x.index, x.target[:n]),
        NAIVE: lambda: naive.scatter(x.values.to(x.dtype), x.index, x.target[:n]),
    }


def pcgrad_program(x: Inputs, peers: Peers) -> Runs:
    """From Gramians to PCGrad's coefficients; many at once only by who can do more than one after another."""
    runs: Runs = {
        OURS: lambda: ops.pcgrad(x.M, x.keys, "all"),
        MATMUL: lambda: plain.coefficients(x.M),
    }
    if x.case.S == 1:
        runs[NAIVE] = lambda: naive.coefficients(x.M[0])
    if x.case.S == 1 and TORCHJD in peers.found:
        from torchjd.aggregation import PCGradWeighting

        theirs = PCGradWeighting()
        runs[TORCHJD] = lambda: theirs(x.M[0])
    return runs


def gradvac_program(x: Inputs, peers: Peers) -> Runs:
    """From Gramians and targets to GradVac's coefficients, the targets moving; many at once as above."""
    shape = (x.case.S, x.case.T, x.case.T)
    targets = torch.zeros(shape, dtype=torch.float64, device=x.device)
    moving = torch.ones(x.case.T, dtype=torch.bool, device=x.device)
    runs: Runs = {OURS: lambda: ops.gradvac(x.M, x.keys, targets, moving, 0.01)}
    if x.case.S == 1 and TORCHJD in peers.found:
        from torchjd.aggregation import GradVacWeighting

        theirs = GradVacWeighting(beta=0.01)
        runs[TORCHJD] = lambda: theirs(x.M[0])
    return runs


def gradattention_network(x: Inputs, peers: Peers) -> Runs:
    """A pass through GradAttention's network, and the step by which it learns."""
    aggregator = gk.GradAttention(subset=ENTRIES)
    return {OURS: lambda: aggregator.weights(x.M, x.X)}


def _by_grad(x: Inputs, combined: Callable[..., list[torch.Tensor]], **kind: bool) -> Run:
    """torch's AdamW, along ``.grad``."""

    @cache
    def optimizer() -> torch.optim.AdamW:
        return torch.optim.AdamW(x.stepped, **kind)

    def run() -> None:
        for p, g in zip(x.stepped, combined(x.grads, x.w, x.case.p), strict=True):
            p.grad = g
        optimizer().step()
        optimizer().zero_grad()

    return run


def _one_launch(x: Inputs, run: Run) -> Runs:
    """``run`` in one launch, as if the table of settings said so, where there can be one."""
    T, P = x.case.T, x.case.P
    if x.device.type != "cuda" or torch.version.hip is not None or T > settings.ONE_LAUNCH_T:
        return {}
    return {ONE_LAUNCH: Under(patch.dict(settings.ONE_LAUNCH, {(T, x.dtype.itemsize): range(P, P + 1)}), run)}


@dataclass(frozen=True)
class Under:
    """A contestant with a setting, in force while it is entered: to make it takes as long as a launch."""

    setting: AbstractContextManager[object]
    run: Run

    def __call__(self) -> Any:
        """Under the setting, if that is in force."""
        return self.run()

    def __enter__(self) -> None:
        self.setting.__enter__()

    def __exit__(self, *raised: Any) -> bool | None:
        return self.setting.__exit__(*raised)


def _plain(peers: Peers, function: Callable[..., Any], arguments: Callable[[], tuple[Any, ...]]) -> Runs:
    """A function of plain PyTorch, as it is and compiled."""
    runs: Runs = {MATMUL: lambda: function(*arguments())}
    if COMPILE in peers.found:
        runs[COMPILE] = lambda: compiled(function)(*arguments())
    return runs


def _pytorch_optimizer(x: Inputs) -> Run:
    from pytorch_optimizer import PCGrad

    optimizer = PCGrad(torch.optim.SGD([torch.zeros(1, requires_grad=True)]), reduction="sum")
    has_grads: list[torch.Tensor] = []

    def run() -> Any:
        if not has_grads:
            has_grads.extend(torch.ones_like(g) for g in x.rows)
        return optimizer.project_conflicting(list(x.rows), has_grads)  # which shuffles its list

    return run


OPERATIONS: dict[str, Callable[[Inputs, Peers], Runs]] = {
    "gramian": gramian,
    "combine": combine,
    "project": project,
    "pcgrad": pcgrad,
    "gradvac": gradvac,
    **{name: Alone(METHODS[name]) for name in VARIANTS},
    "surgery": surgery,
    "adamw": adamw,
    "gather": gather,
    "scatter": scatter,
    "pcgrad-program": pcgrad_program,
    "gradvac-program": gradvac_program,
    NETWORK: gradattention_network,
}

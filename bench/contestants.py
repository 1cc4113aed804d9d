"""The contestants of a case: calls that do the same work, by name. Every case also measures a copy of its input."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

import gradkern as gk
from bench import naive, vectorized
from bench.cases import NETWORK, VARIANTS
from bench.floors import COPY, ENTRIES
from bench.inputs import Inputs
from bench.peers import COMPILE, PYTORCH_OPTIMIZER, TORCHJD, Peers, compiled
from gradkern.aggregators.method import Method
from gradkern.aggregators.methods import METHODS
from gradkern.gradients.layouts import layouts_of
from gradkern.gradients.param_grads import readable
from gradkern.gradients.plan import arranged
from gradkern.kernels.served import served
from gradkern.kernels.settings import Sizes, one_launch_works
from gradkern.ops import operators
from gradkern.optim.adamw import Combination
from gradkern.step.rows import Rows
from gradkern.step.surgery import surgery as step_surgery
from gradkern.tuning.forced import Forced

OURS, ONE_LAUNCH, NAIVE, MATMUL, FOREACH = "gradkern", "one launch", "naive", "matmul", "foreach"
OUT = "gradkern, out="
NAMES = (OURS, ONE_LAUNCH, NAIVE, MATMUL, FOREACH, COMPILE, TORCHJD, PYTORCH_OPTIMIZER, COPY, OUT)

ops = torch.ops.gradkern
Run = Callable[[], Any]
Runs = dict[str, Run]


def contestants(x: Inputs, peers: Peers) -> Runs:
    """Return the contestants of ``x.case``, including the peers found. They compute and allocate only when called."""
    return OPERATIONS[x.case.operation](x, peers) | {COPY: lambda: torch._foreach_copy_(x.target, x.source)}


def gramian(x: Inputs, peers: Peers) -> Runs:
    """Return the contestants that compute M = J Jᵀ."""
    runs: Runs = {OURS: lambda: gk.gramian(x.J), NAIVE: lambda: naive.gramian(x.rows)}
    return runs | _eager_and_compiled(peers, vectorized.gramian, lambda: (x.J,))


def combine(x: Inputs, peers: Peers) -> Runs:
    """Return the contestants that compute wᵀ J."""
    runs: Runs = {OURS: lambda: gk.combine(x.J, x.w), NAIVE: lambda: naive.combine(x.rows, x.w)}
    return runs | _eager_and_compiled(peers, vectorized.combine, lambda: (x.J, x.w))


def project(x: Inputs, peers: Peers) -> Runs:
    """Return the contestants that compute W J."""
    runs: Runs = {OURS: lambda: gk.project(x.J, x.W), NAIVE: lambda: naive.project(x.rows, x.W)}
    return runs | _eager_and_compiled(peers, vectorized.project, lambda: (x.J, x.W))


def pcgrad(x: Inputs, peers: Peers) -> Runs:
    """Return the contestants that do PCGrad's whole surgery on a matrix. One of them has memory for its result."""
    aggregator = gk.PCGrad()

    @cache
    def memory() -> torch.Tensor:
        return torch.empty_like(x.J[0])

    runs: Runs = {
        OURS: lambda: aggregator(x.J),
        OUT: lambda: aggregator(x.J, out=memory()),
        NAIVE: lambda: naive.pcgrad(x.rows),
    }
    runs |= _one_launch(x, runs[OURS])
    runs |= _eager_and_compiled(peers, vectorized.pcgrad, lambda: (x.J,))
    if TORCHJD in peers.found:
        from torchjd.aggregation import PCGrad

        theirs = PCGrad()
        runs[TORCHJD] = lambda: theirs(x.J)
    if PYTORCH_OPTIMIZER in peers.found:
        runs[PYTORCH_OPTIMIZER] = _pytorch_optimizer(x)
    return runs


def gradvac(x: Inputs, peers: Peers) -> Runs:
    """Return the contestants that do GradVac's whole surgery on a matrix."""
    aggregator = gk.GradVac()
    runs: Runs = {OURS: lambda: aggregator(x.J)}
    if TORCHJD in peers.found:
        from torchjd.aggregation import GradVac

        theirs = GradVac(beta=aggregator.beta)
        runs[TORCHJD] = lambda: theirs(x.J)
    return runs


@dataclass(frozen=True)
class Alone:
    """The whole surgery by a method that only gradkern has. GradAttention's network also trains in the call."""

    method: Method

    def __call__(self, x: Inputs, peers: Peers) -> Runs:
        """Return gradkern as the only contestant."""
        aggregator = self.method.seeded(0, x.J.device)
        given = self.method.beside(x.J)
        return {OURS: lambda: aggregator(x.J, **given)}


def surgery(x: Inputs, peers: Peers) -> Runs:
    """Return the contestants that combine a step's gradients where autograd left them.

    Surgery may overwrite the gradients, so gradkern works on the copy.
    """
    aggregator, n = gk.PCGrad(), len(x.shapes)

    @torch.no_grad()
    def ours() -> Any:
        left = [x.target[k : k + n] for k in range(0, len(x.target), n)]
        rows = replace(_rows(x, x.params, left), products_masked=x.case.scope == "all", overwrite=True)
        mask = rows.mask
        results = step_surgery(rows, aggregator, unshared=False, takes_combination=True).combine()
        if mask is not None:
            mask.advance()
        return results

    return {OURS: ours, NAIVE: lambda: naive.surgery(x.grads, x.groups, x.case.p)} | _one_launch(x, ours)


def adamw(x: Inputs, peers: Peers) -> Runs:
    """Return the contestants that take an AdamW step along Σ_t w_t g_t.

    All update the same parameters. For 16-bit parameters only gradkern keeps the moments in float32.
    """

    @cache
    def optimizer() -> gk.optim.AdamW:
        return gk.optim.AdamW(x.stepped)

    @cache
    def rows() -> Rows:
        return _rows(x, x.stepped, x.grads)

    def ours() -> None:
        optimizer().combination = Combination(rows(), x.weights)
        optimizer().step()
        if (mask := rows().mask) is not None:
            mask.advance()

    return {
        OURS: ours,
        NAIVE: _by_grad(x, naive.combined, fused=True),
        FOREACH: _by_grad(x, vectorized.combined, foreach=True),
    }


def _rows(x: Inputs, params: Sequence[Tensor], grads: Sequence[Sequence[Tensor]]) -> Rows:
    """Return a step's rows of parameters that are all shared."""
    layouts, suppression = layouts_of(params), x.suppression
    left = [readable(row, params, layouts) for row in grads]
    units = None if suppression is None else tuple(suppression.first_units(x.numels))
    arrangement = arranged(
        layouts, tuple(map(layouts.reach_of, left)), tuple(x.segments), len(x.groups), (True,) * len(params), units
    )
    return Rows(params, left, arrangement, None if suppression is None else suppression.mask(x.device))


def gather(x: Inputs, peers: Peers) -> Runs:
    """Return the contestants that read the entries GradAttention samples."""
    return {
        OURS: lambda: ops.gather([g for row in x.grads for g in row], x.numels, x.index),
        NAIVE: lambda: naive.gather(x.grads, x.index),
    }


def scatter(x: Inputs, peers: Peers) -> Runs:
    """Return the contestants that write sampled entries of an update into its tensors."""
    n = len(x.shapes)
    return {
        OURS: lambda: ops.scatter(x.values, x.numels, x.index, x.target[:n]),
        NAIVE: lambda: naive.scatter(x.values.to(x.dtype), x.index, x.target[:n]),
    }


def pcgrad_program(x: Inputs, peers: Peers) -> Runs:
    """Return the contestants that compute PCGrad's coefficients from Gramians; for S > 1 only the batched ones."""
    runs: Runs = {
        OURS: lambda: ops.pcgrad(x.M, x.keys, "all"),
        MATMUL: lambda: vectorized.coefficients(x.M),
    }
    if x.case.S == 1:
        runs[NAIVE] = lambda: naive.coefficients(x.M[0])
    if x.case.S == 1 and TORCHJD in peers.found:
        from torchjd.aggregation import PCGradWeighting

        theirs = PCGradWeighting()
        runs[TORCHJD] = lambda: theirs(x.M[0])
    return runs


def gradvac_program(x: Inputs, peers: Peers) -> Runs:
    """Return the contestants that compute GradVac's coefficients from Gramians and targets, and update the targets."""
    shape = (x.case.S, x.case.T, x.case.T)
    targets = torch.zeros(shape, dtype=torch.float64, device=x.device)
    update_mask = torch.ones(x.case.T, dtype=torch.bool, device=x.device)
    runs: Runs = {OURS: lambda: ops.gradvac(x.M, x.keys, targets, update_mask, 0.01)}
    if x.case.S == 1 and TORCHJD in peers.found:
        from torchjd.aggregation import GradVacWeighting

        theirs = GradVacWeighting(beta=0.01)
        runs[TORCHJD] = lambda: theirs(x.M[0])
    return runs


def gradattention_network(x: Inputs, peers: Peers) -> Runs:
    """Return the contestant that runs GradAttention's network, including its own training step."""
    aggregator = gk.GradAttention(subset=ENTRIES)
    return {OURS: lambda: aggregator.weights(x.M, x.X)}


def _by_grad(x: Inputs, combined: Callable[..., list[torch.Tensor]], **kind: bool) -> Run:
    """Return a step of torch's AdamW along ``.grad``."""

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
    """Return ``run`` as a contestant with the one-launch kernel enabled, if the case supports it; else nothing."""
    T, P = x.case.T, x.case.P
    implemented = x.device.type == "cuda" or x.device.type in operators.surgery.implementations  # by the interpreter
    if not implemented or not one_launch_works(T):
        return {}
    key = served.key("one_launch", T, x.dtype.itemsize)
    return {ONE_LAUNCH: WithSetting(Forced({key: Sizes(P, P + 1)}), run)}


@dataclass(frozen=True)
class WithSetting:
    """A contestant that runs under a setting.

    The setting is applied by entering the contestant, because applying it takes as long as a launch.
    """

    setting: AbstractContextManager[object]
    run: Run

    def __call__(self) -> Any:
        """Run under the current setting."""
        return self.run()

    def __enter__(self) -> None:
        self.setting.__enter__()

    def __exit__(self, *raised: Any) -> bool | None:
        return self.setting.__exit__(*raised)


def _eager_and_compiled(peers: Peers, function: Callable[..., Any], arguments: Callable[[], tuple[Any, ...]]) -> Runs:
    """Return a PyTorch function as contestants: eager, and compiled if torch.compile works."""
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
        return optimizer.project_conflicting(list(x.rows), has_grads)  # it shuffles its list

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

"""The launches of weights on a device, counted on a CPU: every operation that computes something is one."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gradkern as gk
from gradkern.aggregators import Aggregator
from gradkern.aggregators.solvers import active_set, arrays, eigen, fair

SOLVED = [
    gk.MGDA,
    gk.CAGrad,
    gk.UPGrad,
    gk.DualProj,
    gk.PCD,
    gk.NashMTL,
    gk.FairGrad,
    gk.IMTLG,
    gk.AlignedMTL,
    gk.ConFIG,
]


class Launches(TorchDispatchMode):
    """The number of operations so far, but for views and new memory. An operator of ours is one, as its kernel is."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (function.is_view or "empty" in function.name() or "detach" in function.name())
        return function(*args, **(kwargs or {}))


def launches(method: type[Aggregator], T: int, monkeypatch: pytest.MonkeyPatch, kernels: bool) -> int:
    monkeypatch.setattr(arrays, "on_host", lambda x: False)
    for solver in (active_set, eigen, fair):
        monkeypatch.setattr(solver, "on_device", lambda x: kernels)
    J = torch.randn(T, 3 * T, dtype=torch.float64)
    M = J @ J.T
    with Launches() as counted:
        method().weights(M)
    return counted.count


@pytest.mark.parametrize("method", SOLVED)
def test_a_solver_is_one_launch(method: type[Aggregator], monkeypatch: pytest.MonkeyPatch) -> None:
    few, more = (launches(method, T, monkeypatch, True) for T in (3, 8))
    assert few == more <= 100
    assert launches(method, 8, monkeypatch, False) > 10 * more  # as PyTorch's operations

"""What all methods have in common that take their weights from the Gramian: absent tasks, overflow, devices."""

import math

import pytest
import torch

import gradkern as gk
from gradkern.aggregators.gramian.base import GramianMethod
from gradkern.aggregators.solvers import arrays
from tests.aggregators.solvers.hard import gramians
from tests.tolerances import assert_near

METHODS: dict[str, GramianMethod] = {
    repr(m): m
    for m in (
        gk.IMTLG(),
        gk.ConFIG(),
        gk.AlignedMTL(),
        gk.AlignedMTL("median"),
        gk.AlignedMTL("rmse"),
        gk.NashMTL(),
        gk.NashMTL(None),
        gk.FairGrad(),
        gk.FairGrad(2.0),
        gk.NTKMTL(),
        gk.NTKMTL(0.0),
        gk.Krum(1),
        gk.Krum(0, 3),
    )
}
each_method = pytest.mark.parametrize("name", METHODS)


@each_method
@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_absent_tasks_are_left_out(name: str, bad: float) -> None:
    method, M = METHODS[name], gramians("common", 1, 6, 7, 30)
    present = torch.tensor([True, False, True, True, True, False, True])
    spoilt = M.clone()
    spoilt[:, 1] = spoilt[:, :, 1] = bad
    w = method.solution(spoilt, present).weights
    expected = method.weights(M[:, present][:, :, present])
    assert (w[:, ~present] == 0).all()
    assert_near(w[:, present], expected, expected.abs().amax(-1, keepdim=True), 1e-9)


@each_method
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gramian_that_is_not_finite_has_no_weights(name: str, bad: float) -> None:
    M = gramians("common", 0, 2, 6, 30)
    expected = METHODS[name].weights(M[1])
    M[0, 2, 2] = bad
    w = METHODS[name].weights(M)
    assert not w[0].isfinite().any()
    assert torch.equal(w[1], expected)


@each_method
def test_where_nothing_may_be_read_the_weights_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    M = gramians("common", 1, 5, 6, 30)
    present = torch.tensor([True, True, False, True, True, True])
    expected = [METHODS[name].solution(M, given).weights for given in (None, present)]
    monkeypatch.setattr(arrays, "on_host", lambda x: False)
    for given, w in zip((None, present), expected, strict=True):
        assert_near(METHODS[name].solution(M, given).weights, w, w.abs().amax(-1, keepdim=True), 1e-9)


@each_method
def test_zeros_alone_have_finite_weights(name: str) -> None:
    M = torch.zeros(2, 6, 6)
    M[1, 4, 4] = 1
    w = METHODS[name].weights(M)
    assert w.isfinite().all()
    assert METHODS[name].weights(torch.ones(0, 6, 6)).shape == (0, 6)


@each_method
def test_a_step_with_memory_and_groups(name: str) -> None:
    """A task that was never present is left out; one that was takes part with its last gradient."""
    p, q = (torch.nn.Parameter(torch.ones(20, dtype=torch.float64)) for _ in range(2))
    J = torch.randn(5, 40, dtype=torch.float64) + torch.randn(1, 40, dtype=torch.float64)
    inner = torch.optim.SGD([("p", p), ("q", q)], lr=0.1)
    opt = gk.SurgeryOptimizer(inner, METHODS[name], groups="parameter", memory=True)
    opt.backward([(torch.cat((p, q)) * g).sum() for g in J])
    info = opt.backward([None, *((torch.cat((p, q)) * g).sum() for g in J[1:])])
    present = torch.tensor([False, True, True, True, True])
    M = torch.stack([gk.gramian(J[:, :20]), gk.gramian(J[:, 20:])])
    assert_near(info.weights, METHODS[name].solution(M, present).weights, 1.0, 1e-9)
    assert (info.weights[:, 0] == 0).all()

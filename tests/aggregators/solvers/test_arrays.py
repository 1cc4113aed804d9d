"""Laws of all solvers: one result on both kinds of arrays, one by one or many at once, and nothing is read."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gradkern.aggregators.solvers.active_set import nonnegative
from gradkern.aggregators.solvers.arrays import carried, lu_solved, solved, space
from gradkern.aggregators.solvers.ball import best_in_ball
from gradkern.aggregators.solvers.eigen import eigh, pseudo_inverse, spread
from gradkern.aggregators.solvers.fair import fair
from gradkern.aggregators.solvers.min_norm import min_norm
from gradkern.aggregators.solvers.scaling import mean_weights, scaled
from tests.aggregators.solvers.hard import gramians
from tests.step.test_no_host_reads import RefusesReads, refused_methods  # noqa: F401  (a fixture)
from tests.tolerances import assert_near


def ball(M: Any, among: Any = None) -> Any:
    """CAGrad's problem."""
    return best_in_ball(M, mean_weights(M, among), 0.4, among)


def bounded(M: Any, among: Any = None) -> Any:
    """DualProj's problem, in the scale of cosines."""
    K, n, rows, _ = problem = scaled(M, among)
    lowest = space(M).where(rows, mean_weights(M, among) * n, 0.0)
    return problem.weights(lowest + nonnegative(K, (K @ lowest[..., None])[..., 0]))


def inverse(M: Any, among: Any = None) -> Any:
    """IMTL-G's problem."""
    problem = scaled(M, among)
    return problem.weights(pseudo_inverse(problem.K, space(M).ones_like(problem.n), 1e-15))


SOLVERS: dict[str, Callable[..., Any]] = {
    "min_norm": min_norm,
    "ball": ball,
    "fair": lambda M, among=None: fair(M, 1.0, 1.0, among),
    "fair-2": lambda M, among=None: fair(M, 2.0, 1.0, among),
    "bounded": bounded,
    "pseudo_inverse": inverse,
}
each_solver = pytest.mark.parametrize("name", SOLVERS)


def some(T: int = 5, n: int = 6) -> Tensor:
    return torch.cat([gramians(kind, 1, n, T, 3 * T) for kind in ("any", "common", "some zero")])


@each_solver
def test_both_kinds_of_arrays_give_one_result(name: str) -> None:
    for T in (1, 2, 3, 5, 12):
        M = some(T)
        on_host, on_device = carried(SOLVERS[name])(M), SOLVERS[name](M)
        assert_near(on_host, on_device, on_device.abs().amax(-1, keepdim=True), 1e-9)


@each_solver
def test_one_by_one_as_many_at_once(name: str) -> None:
    """Exactly on a host; on tensors a product's summation may depend on the number of problems."""
    M = some()
    solve = carried(SOLVERS[name])
    assert torch.equal(solve(M), torch.stack([solve(m) for m in M]))
    assert torch.equal(solve(M.view(3, 6, 5, 5)), solve(M).view(3, 6, 5))
    whole = SOLVERS[name](M)
    assert_near(whole, torch.stack([SOLVERS[name](m) for m in M]), whole.abs().amax(-1, keepdim=True), 1e-11)


@each_solver
def test_tasks_may_come_in_any_order(name: str) -> None:
    M = some()
    order = torch.tensor([3, 0, 4, 2, 1])
    w = carried(SOLVERS[name])(M)
    permuted = carried(SOLVERS[name])(M[:, order][:, :, order])
    assert_near(permuted, w[:, order], w.abs().amax(-1, keepdim=True), 1e-9)


@each_solver
@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_all_losses_may_be_scaled(name: str, scale: float) -> None:
    """The weights of rows s times as long are the same, or a power of s times as large."""
    M = some()
    w, other = carried(SOLVERS[name])(M), carried(SOLVERS[name])(scale**2 * M)
    power = {"min_norm": 0.0, "ball": 0.0, "fair": -1.0, "fair-2": -4 / 3, "bounded": 0.0, "pseudo_inverse": -1.0}[name]
    w = w * scale**power
    assert_near(other, w, w.abs().amax(-1, keepdim=True), 1e-9)


@each_solver
@pytest.mark.parametrize("carry", [carried, lambda f: f])
def test_absent_tasks_are_left_out(name: str, carry: Callable[..., Any]) -> None:
    M = torch.cat([gramians(kind, 1, 6, 5, 15) for kind in ("any", "common")])
    present = torch.tensor([True, False, True, True, False])
    expected = SOLVERS[name](M[:, present][:, :, present])
    M[:, 4] = M[:, :, 4] = math.nan  # what an absent task remembers may have overflowed
    w = carry(SOLVERS[name])(M, present)
    assert (w[:, ~present] == 0).all()
    assert_near(w[:, present], expected, expected.abs().amax(-1, keepdim=True), 1e-9)


@each_solver
@pytest.mark.parametrize("carry", [carried, lambda f: f])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_spoils_itself_alone(name: str, carry: Callable[..., Any], bad: float) -> None:
    M = some(n=2)
    expected = carry(SOLVERS[name])(M)
    M[1, 0, 2] = M[1, 2, 0] = bad
    M[3, 0, 0] = bad
    w = carry(SOLVERS[name])(M)
    spoilt = torch.tensor([False, True, False, True, False, False])
    assert not w[spoilt].isfinite().any(-1).any()
    assert torch.equal(w[~spoilt], expected[~spoilt])


@each_solver
@pytest.mark.parametrize("carry", [carried, lambda f: f])
def test_nothing_but_zeros_and_no_problems(name: str, carry: Callable[..., Any]) -> None:
    assert carry(SOLVERS[name])(torch.zeros(2, 3, 3, dtype=torch.float64)).isfinite().all()
    for shape in ((0, 3, 3), (2, 0, 3, 3)):
        assert carry(SOLVERS[name])(torch.ones(shape, dtype=torch.float64)).shape == shape[:-1]


@each_solver
def test_tensors_without_numbers(name: str) -> None:
    assert carried(SOLVERS[name])(torch.ones(2, 4, 4, device="meta")).shape == (2, 4)
    with FakeTensorMode():
        assert carried(SOLVERS[name])(torch.ones(2, 4, 4)).shape == (2, 4)


@each_solver
def test_nothing_is_read(name: str, refused_methods: None) -> None:  # noqa: F811
    """A mode that watches keeps NumPy away from tensors on a CPU, too."""
    M = torch.eye(4, dtype=torch.float64).expand(3, 4, 4) + 0.5
    with RefusesReads():
        w = carried(SOLVERS[name])(M)
    assert w.shape == (3, 4)


@each_solver
def test_traced_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    M = some(2, 1)
    compiled = torch.compile(carried(SOLVERS[name]), fullgraph=True, backend="aot_eager")
    assert_near(compiled(M), SOLVERS[name](M), SOLVERS[name](M).abs().amax(-1, keepdim=True), 1e-12)


def test_eigenvalues_read_nothing_and_are_traced(refused_methods: None) -> None:  # noqa: F811
    def root(M: Tensor) -> Tensor:
        values, vectors = eigh(M)
        return spread(values.sqrt(), vectors, M[..., 0])

    M = torch.eye(4, dtype=torch.float64).expand(3, 4, 4) + 0.5
    with RefusesReads():
        w = root(M)
    assert w.shape == (3, 4)
    assert root(M.to("meta")).shape == (3, 4)


def test_arguments_are_carried_as_they_are() -> None:
    """Floating tensors as float64, masks as masks, all else untouched; the result without a gradient."""
    seen: list[Any] = []

    def look(*args: Any) -> Any:
        seen.extend(args)
        return args[0][..., 0]

    M = torch.eye(2, dtype=torch.float32, requires_grad=True)
    result = carried(look)(M, torch.tensor([True, False]), None, 2.0)
    assert [type(x) for x in seen] == [np.ndarray, np.ndarray, type(None), float]
    assert [x.dtype for x in seen[:2]] == [np.float64, np.bool_]
    assert result.dtype == torch.float64
    assert not result.requires_grad
    del seen[:]
    with FakeTensorMode():
        carried(look)(torch.ones(2, 2), torch.ones(2) > 0, None, 2.0)
    assert [x.dtype for x in seen[:2]] == [torch.float64, torch.bool]


def test_gradients_do_not_flow() -> None:
    M = some().requires_grad_()
    assert not carried(min_norm)(M).requires_grad
    with FakeTensorMode():
        assert not carried(min_norm)(torch.ones(2, 2, requires_grad=True)).requires_grad


def test_systems_that_are_singular_or_indefinite_spoil_themselves_alone() -> None:
    A = torch.eye(2, dtype=torch.float64).repeat(4, 1, 1)
    A[1], A[2, 0, 0] = 1, -1
    b = torch.ones(4, 2, 1, dtype=torch.float64)
    definite = torch.tensor([True, False, False, True])
    x = solved(A, b)
    assert x[~definite].isnan().all()
    assert (x[definite] == 1).all()
    host = torch.from_numpy(lu_solved(A.numpy(), b.numpy()))
    assert not host[1].isfinite().any()
    assert torch.equal(host[definite], x[definite])

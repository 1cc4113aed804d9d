"""Every method on hard Gramians: against its naive twin on vectors, over segments, on both back ends, compiled."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import gradkern as gk
from gradkern import reference
from gradkern.ops.partners import ORDERED, PARTNERS
from tests.problems import PROBLEMS, conflicting
from tests.tolerances import TOLERANCES, assert_near

# NumPy, in the interpreter, which divides what will not be used.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")

EPS = torch.finfo(torch.float64).eps

Twin = Callable[[Sequence[Tensor], list[list[int]]], list[Tensor]]


def twin_gradvac(grads: Sequence[Tensor], order: list[list[int]]) -> list[Tensor]:
    return reference.gradvac(grads, order, torch.zeros(len(grads), len(grads)), 0.01, EPS)[0]


def of_partner(partner: str, order: list[list[int]] | None) -> gk.PCGrad:
    return gk.PCGrad(partner, order if partner in ORDERED else None)


METHODS: dict[str, tuple[Callable[[list[list[int]] | None], gk.Aggregator], Twin]] = {
    **{partner: (partial(of_partner, partner), partial(reference.pcgrad_of, partner)) for partner in PARTNERS},
    "gradvac": (lambda order: gk.GradVac(order=order), twin_gradvac),
}
each_method = pytest.mark.parametrize("name", METHODS)


def random_order(T: int) -> list[list[int]]:
    return [torch.randperm(T).tolist() for _ in range(T)]


def check(name: str, problem: str, T: int) -> None:
    make, twin = METHODS[name]
    J, order = PROBLEMS[problem](T, 40), random_order(T)
    expected = torch.stack(twin(list(J), order))
    C = make(order).coefficients(gk.gramian(J))
    # 1e-9: float64 throughout, T² projections, each of which may magnify roundings by the ratio of two lengths (up to
    # 1e6 in the ill-conditioned problem, where they come out of nearly parallel rows, 1e3 more).
    size = J.norm(dim=1).max() * T
    tolerance = 1e-9 if problem != "ill-conditioned" else 1e-6
    assert_near(C @ J, expected, size, tolerance)
    assert_near(make(order)(J), expected.sum(0), size, tolerance)


@pytest.mark.parametrize("T", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("problem", PROBLEMS)
@each_method
def test_as_its_paper_says(name: str, problem: str, T: int) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        check(name, problem, T)


@pytest.mark.parametrize("problem", PROBLEMS)
@each_method
def test_the_kernels_too(name: str, problem: str, triton_serves_the_cpu: list[str]) -> None:
    for T in (1, 2, 4):
        check(name, problem, T)
    assert "gramian" in triton_serves_the_cpu


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, in the interpreter
@pytest.mark.parametrize("T", [2, 4])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@each_method
def test_one_overflowed_task(name: str, bad: float, T: int, back_end: str) -> None:
    """It is no error, it does not vanish, and what other segments get is what they get without it."""
    make, _ = METHODS[name]
    M = torch.stack([gk.gramian(conflicting(T, 40)) for _ in range(2)])
    order = random_order(T)
    expected = make(order).weights(M[1])
    broken = conflicting(T, 40)
    broken[1, 3] = bad
    M[0] = gk.gramian(broken)
    w = make(order).weights(M)
    assert torch.equal(w[1], expected)
    assert not gk.combine(broken, w[0]).isfinite().all()


@each_method
def test_over_segments_as_over_a_loop(name: str, back_end: str) -> None:
    J, offsets = conflicting(4, 600), torch.tensor([0, 100, 120, 120, 600])
    make, _ = METHODS[name]
    order = random_order(4)
    whole = make(order)(J, offsets)
    parts = [make(order)(J[:, a:b].contiguous()) for a, b in ((0, 100), (100, 120), (120, 600))]
    assert_near(whole, torch.cat(parts), J.abs().max() * 10, TOLERANCES[torch.float64])


@each_method
def test_over_leading_dimensions(name: str) -> None:
    M = torch.stack([gk.gramian(conflicting(3, 40)) for _ in range(6)]).view(2, 3, 3, 3)
    make, _ = METHODS[name]
    order = random_order(3)
    w = make(order).weights(M)
    assert w.shape == (2, 3, 3)
    for i in range(2):
        for j in range(3):
            assert torch.equal(w[i, j], make(order).weights(M[i, j]))


@each_method
def test_mean_is_the_sum_over_t(name: str) -> None:
    M = gk.gramian(conflicting(4, 40))
    make, _ = METHODS[name]
    order = random_order(4)
    total, method = make(order).weights(M), make(order)
    method.reduction = "mean"
    assert torch.allclose(method.weights(M), total / 4, rtol=1e-14)


@each_method
def test_only_the_present_tasks_add_up(name: str) -> None:
    M = gk.gramian(conflicting(4, 40)).unsqueeze(0)
    make, _ = METHODS[name]
    order = random_order(4)
    present = torch.tensor([True, False, True, False])
    w = make(order).solution(M, present).weights
    assert torch.allclose(w, make(order).coefficients(M)[:, present].sum(-2), rtol=1e-14)


@each_method
def test_compiled_it_gives_the_same(name: str) -> None:
    make, _ = METHODS[name]
    order = random_order(3)
    method, eager = make(order), make(order)
    compiled = torch.compile(method.weights, backend="aot_eager")
    for seed in range(3):
        torch.manual_seed(seed)
        M = gk.gramian(conflicting(3, 40))
        assert torch.equal(compiled(M), eager.weights(M))


def test_partners_that_depend_on_no_order_draw_nothing() -> None:
    M = gk.gramian(conflicting(4, 40))
    for partner in ("average", "most_similar", "most_different"):
        state = torch.get_rng_state()
        gk.PCGrad(partner).weights(M)
        assert torch.equal(torch.get_rng_state(), state)


def test_a_random_partner_is_uniform() -> None:
    """Three tasks that all conflict: each partner of each task equally often, independently of the others'."""
    M = torch.tensor([[1.0, -0.5, -0.4], [-0.5, 1.0, -0.3], [-0.4, -0.3, 1.0]], dtype=torch.float64)
    n = 4000
    C = gk.PCGrad("random", generator=torch.Generator().manual_seed(1)).coefficients(M.expand(n, 3, 3))
    off_diagonal = (C != 0) & ~torch.eye(3, dtype=torch.bool)
    assert (off_diagonal.sum(-1) == 1).all()
    share = off_diagonal.double().mean(0)[~torch.eye(3, dtype=torch.bool)]
    assert ((share - 0.5).abs() < 5 * 0.5 / n**0.5).all()  # five standard deviations


def test_of_equally_similar_partners_the_first() -> None:
    M = torch.tensor([[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, -0.5, 1.0]])
    expected = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.5, 0.0, 1.0]])
    for partner in ("most_similar", "most_different"):
        assert torch.equal(gk.PCGrad(partner).coefficients(M), expected)


def test_operators_keep_torchs_contract() -> None:
    ops = torch.ops.gradkern
    M, keys = torch.randn(2, 3, 3), torch.rand(2, 3, 3)
    targets, moving = torch.zeros(2, 3, 3, dtype=torch.float64), torch.ones(3, dtype=torch.bool)
    opcheck(ops.gradvac.default, (M, keys, targets, moving, 0.5))
    opcheck(ops.gradvac.default, (M.mT, keys[:1], targets, moving, 0.5))


@each_method
def test_a_task_whose_square_vanishes_is_never_projected_onto(name: str) -> None:
    """In float32 the square of 1e-25 is 0 while its products with others are not."""
    J = torch.stack((torch.ones(4), torch.full((4,), -1e-25)))
    make, _ = METHODS[name]
    C = make([[0, 1], [0, 1]]).coefficients(gk.gramian(J))
    assert torch.equal(C[0], torch.tensor([1.0, 0.0]))
    assert C.isfinite().all()


@pytest.mark.parametrize("T", [2, 3, 8])
@each_method
def test_in_float32(name: str, T: int) -> None:
    for problem in ("conflicting", "zero", "tiny", "huge"):
        J, order = PROBLEMS[problem](T, 40).float(), random_order(T)
        make, twin = METHODS[name]
        # 1e-3: the float32 Gramian's 1e-7, through T² projections of random rows.
        assert_near(make(order)(J), torch.stack(twin(list(J), order)).sum(0), J.double().norm(dim=1).max() * T, 1e-3)

"""PCGrad on matrices and Gramians: against the paper's algorithm on vectors, and by its properties."""

import itertools
import warnings

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import gradkern as gk
from gradkern import reference
from gradkern.ops.partners import ORDERED, PARTNERS
from tests.tolerances import DTYPES, TOLERANCES, assert_near

SOME_T = [1, 2, 3, 5, 8, 16, 40]


def conflicting(T: int, P: int = 50) -> Tensor:
    """Random gradients around a common direction pointing both ways: about half of the pairs conflict."""
    return torch.randn(T, P, dtype=torch.float64) + torch.randn(T, 1, dtype=torch.float64)


def random_order(T: int) -> Tensor:
    return torch.stack([torch.randperm(T) for _ in range(T)])


@pytest.mark.parametrize("T", SOME_T)
def test_as_the_paper_says(T: int, device: torch.device) -> None:
    J, order = conflicting(T), random_order(T)
    method = gk.PCGrad(order=order)
    modified = reference.pcgrad(J, order.tolist())
    size = J.norm(dim=1).max() * T
    C = method.coefficients(gk.gramian(J.to(device)))
    # 1e-10: float64 throughout, each of the T^2 projections adding roundings that conflicts can magnify.
    assert_near(gk.project(J.to(device), C).cpu(), torch.stack(modified), size, 1e-10)
    assert_near(method(J.to(device)).cpu(), sum(modified), size, 1e-10)
    assert torch.equal(C, torch.eye(T, dtype=C.dtype, device=device)) == (T == 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype: torch.dtype, device: torch.device) -> None:
    J = conflicting(4, 5000).to(dtype)
    expected = sum(reference.pcgrad(J, [range(4)] * 4))
    out = gk.PCGrad(order=[0, 1, 2, 3])(J.to(device))
    assert out.dtype == dtype
    # 10: weights of up to a few units multiply the rounding of the rows.
    assert_near(out.cpu(), expected, 10 * J.double().abs().max(), TOLERANCES[dtype])


@pytest.mark.parametrize("partner", PARTNERS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_matrix_at_once(reduction: str, partner: str, device: torch.device) -> None:
    """On vectors, in the order that the generator gives; the same under autocast, compiled, and with derivatives."""
    J = conflicting(5, 300)
    order = torch.rand(1, 5, 5, generator=torch.Generator(device).manual_seed(3), device=device).argsort(-1)[0].tolist()
    expected = sum(reference.pcgrad_of(partner, J, order)) / (1 if reduction == "sum" else 5)

    def update(J: Tensor) -> Tensor:
        generator = torch.Generator(device).manual_seed(3)
        return gk.PCGrad(partner=partner, reduction=reduction, generator=generator)(J.to(device)).cpu()

    leaf = J.clone().requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        under_autocast = update(J.float())
    # 1e-10 as above; float32 rounds to 6e-8, which conflicts magnify.
    assert_near(update(J), expected, J.norm(dim=1).max(), 1e-10)
    assert_near(update(leaf).detach(), expected, J.norm(dim=1).max(), 1e-10)
    assert_near(under_autocast, expected, J.norm(dim=1).max(), 1e-5)


@pytest.mark.parametrize("method", [gk.PCGrad(order=[0, 1, 2]), gk.PCGrad("most_similar")])
def test_a_matrix_at_once_compiles(method: gk.PCGrad, device: torch.device) -> None:
    J = conflicting(3).to(device)
    compiled = torch.compile(method, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(J), method(J))


def test_a_subclass_has_its_own_weights(device: torch.device) -> None:
    class Doubled(gk.PCGrad):
        def weights(self, M: Tensor) -> Tensor:
            return 2 * super().weights(M)

    J = conflicting(3).to(device)
    once, twice = gk.PCGrad(order=[0, 1, 2])(J), Doubled(order=[0, 1, 2])(J)
    assert_near(twice, 2 * once, J.norm(dim=1).max(), 1e-12)  # float64, summed in another order


def test_one_order_for_all_tasks_skips_the_own_index(device: torch.device) -> None:
    M = gk.gramian(conflicting(4).to(device))
    row = [2, 0, 3, 1]
    assert torch.equal(gk.PCGrad(order=row).weights(M), gk.PCGrad(order=[row] * 4).weights(M))


def test_order_matters(device: torch.device) -> None:
    """Otherwise the tests of the order would hold for any order."""
    M = gk.gramian(conflicting(4).to(device))
    found = {tuple(gk.PCGrad(order=p).weights(M).tolist()) for p in itertools.permutations(range(4))}
    assert len(found) > 6


def test_mean_is_the_sum_over_t(device: torch.device) -> None:
    M = gk.gramian(conflicting(3).to(device))
    total = gk.PCGrad(order=[0, 1, 2]).weights(M)
    assert torch.allclose(gk.PCGrad(order=[0, 1, 2], reduction="mean").weights(M), total / 3, rtol=1e-14)


def test_batched_over_leading_dimensions(device: torch.device) -> None:
    M = torch.stack([gk.gramian(conflicting(3)) for _ in range(6)]).reshape(2, 3, 3, 3).to(device)
    method = gk.PCGrad(order=[[0, 1, 2], [2, 1, 0], [1, 0, 2]])
    w = method.weights(M)
    assert w.shape == (2, 3, 3)
    for i, j in itertools.product(range(2), range(3)):
        assert torch.equal(w[i, j], method.weights(M[i, j]))


def test_segments_are_independent_problems(device: torch.device) -> None:
    J, offsets = conflicting(3, 300).to(device), torch.tensor([0, 100, 120, 300])
    method = gk.PCGrad(order=[0, 1, 2])
    parts = [method(part.contiguous()) for part in J.tensor_split((100, 120), dim=1)]
    assert_near(method(J, offsets), torch.cat(parts), J.abs().max() * 10, TOLERANCES[torch.float64])


def test_random_orders_are_fresh_per_segment_and_task_and_uniform(device: torch.device) -> None:
    """Three tasks that all conflict: each order of each task gives its own coefficients, all equally often."""
    M = torch.tensor([[1.0, -0.5, -0.4], [-0.5, 1.0, -0.3], [-0.4, -0.3, 1.0]], dtype=torch.float64, device=device)
    n = 4000
    C = gk.PCGrad(generator=torch.Generator(device).manual_seed(1)).coefficients(M.expand(n, 3, 3))
    forward, backward = (gk.PCGrad(order=o).coefficients(M) for o in ([0, 1, 2], [2, 1, 0]))
    is_forward = (C - forward).abs().amax(-1) < 1e-12
    is_backward = (C - backward).abs().amax(-1) < 1e-12
    assert (is_forward ^ is_backward).all()
    share = is_forward.double().mean(0).cpu()
    assert ((share - 0.5).abs() < 5 * 0.5 / n**0.5).all()  # five standard deviations
    for i, j in ((0, 1), (0, 2), (1, 2)):
        agree = (is_forward[:, i] == is_forward[:, j]).double().mean()
        assert abs(agree.item() - 0.5) < 5 * 0.5 / n**0.5


def test_generator_decides(device: torch.device) -> None:
    M = gk.gramian(conflicting(5).to(device))

    def draw(seed: int) -> Tensor:
        return gk.PCGrad(generator=torch.Generator(device).manual_seed(seed)).weights(M.expand(8, 5, 5))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    torch.manual_seed(7)
    first = gk.PCGrad().weights(M.expand(8, 5, 5))
    torch.manual_seed(7)
    assert torch.equal(gk.PCGrad().weights(M.expand(8, 5, 5)), first)


def test_generator_state_is_saved_and_restored() -> None:
    M = gk.gramian(conflicting(5)).expand(8, 5, 5)
    method = gk.PCGrad(generator=torch.Generator().manual_seed(3))
    method.weights(M)
    saved = method.state_dict()
    expected = method.weights(M)
    fresh = gk.PCGrad(generator=torch.Generator())
    fresh.load_state_dict(saved)
    assert torch.equal(fresh.weights(M), expected)
    with pytest.raises(ValueError, match="generator is None"):
        gk.PCGrad().load_state_dict(saved)
    before = fresh.state_dict()["_extra_state"]
    for bad in (3, "state", torch.ones(3)):
        with pytest.raises(TypeError, match="the generator's state must be "):
            fresh.load_state_dict({"_extra_state": bad})
    assert torch.equal(fresh.state_dict()["_extra_state"], before)


def test_non_finite_gramians_give_no_error_and_finite_ones_beside_them_are_untouched(device: torch.device) -> None:
    M = gk.gramian(conflicting(3).to(device)).repeat(3, 1, 1)
    M[0, 1, :] = M[0, :, 1] = float("nan")
    M[1, 1, :] = M[1, :, 1] = -float("inf")
    method = gk.PCGrad(order=[0, 1, 2])
    assert torch.equal(method.weights(M)[2], method.weights(M[2]))


def test_large_gradients_do_not_overflow(device: torch.device) -> None:
    """Squares near the end of float32: a product of two of them would be infinite."""
    J = torch.tensor([[1e19, 0.0], [-1e19, 1e18]], device=device)
    expected = sum(reference.pcgrad(J.cpu(), [[0, 1], [0, 1]]))
    assert_near(gk.PCGrad()(J).cpu(), expected, 1e19, TOLERANCES[torch.float32])


gradients = hnp.arrays(
    np.float64,
    st.tuples(st.integers(2, 5), st.integers(1, 12)),
    elements=st.floats(-10, 10, allow_subnormal=False).map(lambda x: round(x, 3)),
)


@settings(max_examples=60)
@given(gradients)
def test_two_tasks_never_conflict_with_the_result(rows: np.ndarray) -> None:
    J = torch.from_numpy(rows[:2])
    g = gk.PCGrad()(J)
    # 1e-12: the roundings of the dot products, relative to the lengths.
    assert (J @ g >= -1e-12 * (1 + J.norm(dim=1) ** 2 + J.norm() * g.norm())).all()


@settings(max_examples=60)
@given(gradients, st.sampled_from([2.0**-20, 0.5, 4.0, 2.0**20]))
def test_scaling_all_losses_scales_the_result(rows: np.ndarray, scale: float) -> None:
    J = torch.from_numpy(rows)
    method = gk.PCGrad(order=list(range(len(J))))
    assert torch.equal(method(scale * J), scale * method(J))  # powers of two round nothing


@settings(max_examples=60)
@given(gradients, st.randoms(use_true_random=False))
def test_permuting_tasks_and_order_changes_nothing(rows: np.ndarray, random) -> None:
    J = torch.from_numpy(rows)
    T = len(J)
    perm = random.sample(range(T), T)
    place = torch.argsort(torch.tensor(perm))
    order = [random.sample(range(T), T) for _ in range(T)]
    permuted = [[int(place[j]) for j in order[i]] for i in perm]
    result, expected = gk.PCGrad(order=permuted)(J[perm]), gk.PCGrad(order=order)(J)
    # Sums in another order; a dot product that is zero but for its rounding may be projected or not.
    assert_near(result, expected, 1 + J.norm() * T, 1e-9)


@settings(max_examples=60)
@given(gradients)
def test_without_conflict_it_is_the_sum(rows: np.ndarray) -> None:
    J = torch.from_numpy(rows).abs()
    assert torch.equal(gk.PCGrad()(J), gk.Sum()(J))


@settings(max_examples=60)
@given(gradients, st.integers(0, 5))
def test_a_zero_gradient_is_harmless(rows: np.ndarray, position: int) -> None:
    J = torch.from_numpy(rows)
    T = len(J)
    position = min(position, T)
    with_zero = torch.cat((J[:position], torch.zeros_like(J[:1]), J[position:]))
    others = [t for t in range(T + 1) if t != position]
    order = [position, *others]
    result = gk.PCGrad(order=order)(with_zero)
    assert_near(result, gk.PCGrad(order=list(range(T)))(J), 1 + J.norm() * T, 1e-9)


@pytest.mark.parametrize("partner", PARTNERS)
@pytest.mark.parametrize("zeros", [1, 40])
def test_zero_gradients_are_nobodys_partners(zeros: int, partner: str, device: torch.device) -> None:
    """Two tasks in conflict give [.5, 1.5], with any number of gradients of zero before, between and after them."""
    J = torch.zeros(2 + 3 * zeros, 2, device=device)
    J[zeros], J[1 + 2 * zeros] = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    assert gk.PCGrad(partner)(J).tolist() == [0.5, 1.5]
    w = gk.PCGrad(partner).weights((J @ J.mT).expand(2, -1, -1))
    assert w[:, [zeros, 1 + 2 * zeros]].tolist() == [[2.0, 1.5]] * 2
    assert w.sum(-1).tolist() == [3.5 + 3 * zeros] * 2  # a gradient of zero keeps its weight of 1


@pytest.mark.parametrize("partner", ORDERED)
def test_gradients_of_zero_change_no_order(partner: str) -> None:
    J = conflicting(5)
    J[3] = 0
    order = [3, 1, 4, 0, 2]
    without = gk.PCGrad(partner, order=[1, 3, 0, 2])(J[[0, 1, 2, 4]])
    assert_near(gk.PCGrad(partner, order=order)(J), without, J.norm(), 1e-13)


def test_the_order_is_the_methods_own() -> None:
    order = torch.tensor([1, 0])
    method = gk.PCGrad(order=order)
    order[0] = 7
    assert method.order.tolist() == [1, 0]


def test_ambient_dtype_and_device_change_nothing() -> None:
    M = gk.gramian(conflicting(5)).expand(50, 5, 5)
    expected = gk.PCGrad(generator=torch.Generator().manual_seed(1)).weights(M)
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert torch.equal(gk.PCGrad(generator=torch.Generator().manual_seed(1)).weights(M), expected)
        p = torch.nn.Parameter(torch.ones(2, dtype=torch.float32))
        assert gk.backward([p.sum(), None], [p], aggregator=gk.PCGrad()).gramian.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        method = gk.PCGrad(order=torch.tensor([0, 1, 2, 3, 4], device="cpu"))
    assert torch.equal(method.weights(M), gk.PCGrad(order=range(5)).weights(M))


@pytest.mark.parametrize("method", [gk.PCGrad(order=[1, 0]), gk.Sum()])
def test_a_use_without_numbers_leaves_no_trace(method: gk.Aggregator) -> None:
    J = torch.eye(2)
    with FakeTensorMode():
        method(torch.eye(2))
    method(J.to("meta"))
    with torch.inference_mode():
        method(torch.eye(2))
    (g,) = torch.autograd.grad(method(J.requires_grad_()).sum(), J)
    assert torch.equal(g, torch.ones(2, 2))


def test_repr_is_exact() -> None:
    for text in (
        "PCGrad(partner='all', order=None, reduction='sum')",
        "PCGrad(partner='random', order=[[1, 0], [0, 1]], reduction='mean')",
    ):
        assert repr(eval(text, {"PCGrad": gk.PCGrad})) == text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"reduction": "max"}, ValueError, "reduction must be 'sum' or 'mean', got 'max'"),
        ({"order": [0, 2]}, ValueError, "order must be a permutation of 0 … 1 in every row, got \\[0, 2\\]"),
        ({"order": [0.0, 1.0]}, TypeError, r"order\[0\] must be an integer, got 0.0"),
        ({"order": [True, 0]}, TypeError, r"order\[0\] must be an integer, got True"),
        ({"order": [[0, 1, 2], [0, 1, 2]]}, ValueError, r"order must have shape .*got \[\[0, 1, 2\], \[0, 1, 2\]\]"),
        ({"order": [[[0, 1]]]}, TypeError, r"order\[0\] must be an integer, got \[0, 1\]"),
        ({"order": [[0, 1], 1]}, TypeError, r"order\[1\] must be a row of integers, got 1"),
        ({"order": 3}, TypeError, r"order must be integers, \(T,\) or \(T, T\), got 3"),
        ({"order": b"01"}, TypeError, r"order must be integers, \(T,\) or \(T, T\), got b'01'"),
        ({"order": "01"}, TypeError, r"order must be integers, \(T,\) or \(T, T\), got '01'"),
        ({"order": {0, 1}}, TypeError, r"order must be integers, \(T,\) or \(T, T\), got \{0, 1\}"),
        ({"order": torch.arange(2).to_sparse()}, TypeError, r"order must be integers, .*, got tensor\(indices"),
        ({"order": []}, ValueError, r"order must have shape .*, got \[\]"),
        ({"order": [[]]}, ValueError, r"order must have shape .*, got \[\[\]\]"),
        ({"order": [0, None]}, TypeError, r"order\[0\] must be an integer, got None"),
        ({"order": [[0, 1], [1]]}, ValueError, "order must have shape"),
        ({"order": [0, 10**400]}, ValueError, r"order\[0\] must be an integer from .*, got 1000"),
        ({"partner": "none"}, ValueError, "partner must be 'all', 'random'.* or 'most_different', got 'none'"),
        ({"partner": [0, 1]}, TypeError, r"partner must be 'all', 'random'.*, got \[0, 1\]"),
        ({"partner": np.array(["all", "random"])}, TypeError, r"partner must be 'all'.*, got array\(\['all'"),
        ({"reduction": np.array(["sum", "mean"])}, TypeError, r"reduction must be 'sum' or 'mean', got array"),
        (
            {"partner": "average", "order": [0, 1]},
            ValueError,
            r"order must be None with partner='average', which uses none; got \[0, 1\]",
        ),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator or None, got 3"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gk.PCGrad(**arguments)


anything = st.one_of(st.text(max_size=5), st.integers(), st.none(), st.booleans(), st.sampled_from(PARTNERS))


@given(anything, st.one_of(anything, st.sampled_from(["sum", "mean"])))
def test_what_is_out_of_range_names_itself(partner: object, reduction: object) -> None:
    if partner in PARTNERS and reduction in ("sum", "mean"):
        gk.PCGrad(partner, reduction=reduction)
    else:
        name = "partner" if partner not in PARTNERS else "reduction"
        with pytest.raises((TypeError, ValueError), match=f"{name} must be .*got "):
            gk.PCGrad(partner, reduction=reduction)


@pytest.mark.parametrize(
    ("M", "error", "message"),
    [
        ([[1.0]], TypeError, r"M must be a tensor, got \[\[1.0\]\]"),
        (torch.ones(2, 2, dtype=torch.int64), TypeError, "M must be float32 or float64.*int64"),
        (torch.ones(2, 3), ValueError, "M must have shape .*got \\(2, 3\\)"),
        (torch.ones(3), ValueError, "M must have shape .*got \\(3,\\)"),
        (torch.eye(4), ValueError, "order is for 3 tasks, M has 4"),
    ],
)
def test_bad_gramians(M: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gk.PCGrad(order=[0, 1, 2]).weights(M)


@pytest.mark.parametrize("S", [1, 200])
def test_overflowed_gradients_warn_of_nothing(S: int) -> None:
    """They are for the gradient scaler to find; the rows that are finite keep their weights."""
    M = torch.tensor([[4.0, -1.0, torch.inf], [-1.0, 1.0, -torch.inf], [torch.inf, -torch.inf, torch.inf]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        C = gk.PCGrad(order=[0, 1, 2]).coefficients(M.repeat(S, 1, 1))
    assert torch.equal(C[:, 0, :2], torch.tensor([1.0, 1.0]).expand(S, 2))  # s = -1 onto a partner of square 1


@pytest.mark.parametrize("partner", PARTNERS)
def test_a_matrix_whose_weights_overflow_warns_of_nothing(partner: str) -> None:
    J = torch.tensor([[1e19, 0.0], [-1e-20, 1e-22]])  # a coefficient of 1e39, which float32 has no number for
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        update = gk.PCGrad(partner)(J)
    assert not update.isfinite().all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_holds_the_method_and_not_its_weights() -> None:
    traced = torch.jit.trace(gk.PCGrad(order=[0, 1, 2]), torch.randn(3, 50), check_trace=False)
    J = torch.randn(3, 50)
    J[1] = 0.1 * J[1] - J[0]  # in conflict, which the gradients of the trace need not have been
    expected = torch.stack(reference.pcgrad(list(J), [[0, 1, 2]] * 3)).sum(0)
    assert_near(traced(J), expected, J.abs().sum(0).max(), TOLERANCES[torch.float32])

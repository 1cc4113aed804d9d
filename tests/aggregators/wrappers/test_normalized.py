"""Methods on divided gradients: their updates are those of gradients that were divided beforehand."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import gradkern as gk
from gradkern import reference
from tests.aggregators.solvers.hard import ROWS, SPREADS, gramians
from tests.problems import conflicting
from tests.tolerances import assert_near

WITHIN: dict[str, Callable[[], gk.Aggregator]] = {
    "mgda": gk.MGDA,
    "pcgrad": partial(gk.PCGrad, "average"),
    "gradvac": partial(gk.GradVac, order=list(range(40))),
    "sum": gk.Sum,
    "mean": gk.Mean,
    "wrapped": lambda: gk.Smoothed(gk.MGDA()),
}
each_method = pytest.mark.parametrize("name", WITHIN)


def made(name: str, T: int) -> gk.Aggregator:
    return gk.GradVac(order=list(range(T))) if name == "gradvac" else WITHIN[name]()


@pytest.mark.parametrize("T", [1, 2, 3, 8, 20, 40])
@each_method
def test_the_update_is_that_of_unit_gradients(name: str, T: int) -> None:
    torch.manual_seed(T)
    J = conflicting(T, 60) * 10 ** (6 * torch.rand(T, 1, dtype=torch.float64) - 3)
    units = J / J.norm(dim=1, keepdim=True)
    # Nearly singular hulls of 40 conflicting rows lose digits: rows of length 1 differ by a rounding.
    assert_near(gk.Normalized(made(name, T))(J), made(name, T)(units), T**0.5, 1e-9)


@pytest.mark.parametrize("kind", ROWS)
def test_hard_rows_fall_short_nowhere(kind: str) -> None:
    """MGDA's condition for unit rows, ĝ_i · d >= d · d, from the Gramian of the rows as they are."""
    torch.manual_seed(0)
    for T in (2, 3, 8, 20, 40):
        for spread in SPREADS:
            M = gramians(kind, spread, 5, T, 50)
            n = M.diagonal(dim1=-2, dim2=-1).sqrt()
            w = gk.Normalized(gk.MGDA()).weights(M)
            assert w.isfinite().all()
            products = (M @ w.unsqueeze(-1)).squeeze(-1)
            short = (w * products).sum(-1, keepdim=True) - torch.where(n > 0, products / n, 0.0)
            assert torch.where(n > 0, short, 0.0).amax() <= 1e-9


@pytest.mark.parametrize("by", ["l2", "loss", "loss+"])
def test_as_its_twin_with_losses(by: str) -> None:
    J = conflicting(4, 9)
    losses = [0.1, 2.0, 30.0, 1.0]
    w = gk.Normalized(gk.MGDA(), by).weights(reference.gramian(list(J)), torch.tensor(losses))
    expected = reference.normalized_mgda(list(J), by=by, losses=losses)
    assert_near(reference.combine(list(J), w.tolist()), expected, expected.norm() + 1, 1e-9)


@pytest.mark.parametrize("by", ["loss", "loss+"])
def test_a_step_divides_by_its_losses_and_leaves_absent_tasks_out(by: str) -> None:
    J = torch.randn(4, 9, dtype=torch.float64)
    p = torch.nn.Parameter(torch.ones(9, dtype=torch.float64))
    scale = torch.tensor([0.1, 2.0, 30.0, 1.0], dtype=torch.float64)
    losses = [(p * J[t]).sum().square().add(1.0) * scale[t] for t in range(4)]
    grads = [torch.autograd.grad(loss, p, retain_graph=True)[0] for loss in losses]
    values = [loss.item() for loss in losses]
    info = gk.backward([losses[0], losses[1], None, losses[3]], [p], aggregator=gk.Normalized(gk.MGDA(), by))
    some = [0, 1, 3]
    expected = reference.normalized_mgda([grads[t] for t in some], by=by, losses=[values[t] for t in some])
    assert_near(p.grad, expected, max(g.norm() for g in grads), 1e-9)
    assert info.weights[2] == 0


def test_losses_go_to_the_method_within() -> None:
    """By lengths outside and by losses inside, the hull is that of both."""
    M, losses = gk.gramian(conflicting(4, 9)), torch.tensor([0.1, 2.0, 30.0, 1.0])
    method = gk.Normalized(gk.MGDA("loss"))
    assert method.needs_losses
    assert not gk.Normalized(gk.MGDA()).needs_losses
    w = method.weights(M, losses)
    expected = gk.MGDA("loss+").weights(M, losses) / M.diagonal().sqrt()
    assert_near(w, expected, expected.max(), 1e-9)


def test_the_precision_of_the_rows_goes_to_the_method_within() -> None:
    """Float32 rows have float32 digits, though their divided Gramian is float64: GradVac's cap depends on it."""
    assert gk.Normalized(gk.GradVac()).needs_eps
    target = torch.full((1, 2, 2), 1.0, dtype=torch.float64)
    J = torch.tensor([[3.0, 0.0], [0.0, 0.2]])
    weights = []
    for dtype in (torch.float32, torch.float64):
        method = gk.GradVac(order=[0, 1])
        method.targets = target.clone()
        weights.append(gk.Normalized(method)(J.to(dtype)).abs().max())
    assert weights[0] < 100 < weights[1]


def test_zero_rows_have_no_weight_and_spoil_none() -> None:
    J = conflicting(4, 9)
    J[1] = 0
    for name in WITHIN:
        w = gk.Normalized(made(name, 4)).weights(J @ J.mT)
        assert w[1] == 0
        assert w.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@each_method
def test_a_gramian_that_is_not_finite_shows(name: str, bad: float) -> None:
    J = conflicting(3, 9)
    M = torch.stack([J @ J.mT] * 2)
    expected = gk.Normalized(made(name, 3)).weights(M[1])
    M[0, 2, 2] = bad
    w = gk.Normalized(made(name, 3)).weights(M)
    assert w[0, 2].isnan()
    assert torch.equal(w[1], expected)


def test_absent_tasks_take_part_as_the_method_within_says() -> None:
    torch.manual_seed(0)
    J = torch.randn(3, 9, dtype=torch.float64)
    units = J / J.norm(dim=1, keepdim=True)
    present = torch.tensor([True, False, True])
    for within in (gk.MGDA(), gk.PCGrad("average")):
        w = gk.Normalized(within).solution((J @ J.mT)[None], present).weights
        v = within.solution((units @ units.mT)[None], present).weights
        assert_near(w * J.norm(dim=1), v, v.abs().max(), 1e-12)
    M = (J @ J.mT)[None].clone()
    M[:, 1], M[:, :, 1] = torch.nan, torch.inf
    assert gk.Normalized(gk.MGDA()).solution(M, present).weights[0, [0, 2]].isfinite().all()


def test_losses_that_cannot_divide() -> None:
    M = gk.gramian(torch.randn(3, 5))
    for by in ("loss", "loss+"):
        assert gk.Normalized(gk.Sum(), by).weights(M, torch.tensor([1.0, torch.nan, 2.0]))[1].isnan()
        for bad in (0.0, -1.0):
            with pytest.raises(ValueError, match=rf"losses\[1\] must be above 0, because gradients are .*; got {bad}"):
                gk.Normalized(gk.Sum(), by).weights(M, torch.tensor([1.0, bad, 2.0]))
    with pytest.raises(ValueError, match="losses must be given with by='loss', got None"):
        gk.Normalized(gk.MGDA(), "loss")(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"losses must have shape \(..., 3\) for 3 tasks"):
        gk.Normalized(gk.MGDA(), "loss+").weights(M, torch.ones(2))


def test_a_loss_that_cannot_divide_moves_no_state() -> None:
    method = gk.Smoothed(gk.Normalized(gk.MGDA(), "loss"))
    M = torch.eye(3)
    method.weights(M, torch.ones(3))
    before = {key: copy.deepcopy(value) for key, value in method.state_dict().items()}
    with pytest.raises(ValueError, match=r"losses\[2\] must be above 0"):
        method.weights(M, torch.tensor([1.0, 1.0, 0.0]))
    assert before.keys() == method.state_dict().keys()
    assert all(x is before[k] is None or torch.equal(x, before[k]) for k, x in method.state_dict().items())


class Weighing(gk.aggregators.Scalarization):
    def task_weights(self, n_tasks: int) -> list[float]:
        return [1.0] * n_tasks


@pytest.mark.parametrize("within", [gk.GradAttention(4), Weighing()])
def test_a_method_that_it_cannot_be_around_is_named(within: gk.Aggregator) -> None:
    with pytest.raises(ValueError, match=f"aggregator must look at the Gramian.*{type(within).__name__}"):
        gk.Normalized(within)
    with pytest.raises(TypeError, match=r"aggregator must be a gradkern\.Aggregator, got 3"):
        gk.Normalized(3)  # type: ignore[arg-type]


def test_batches_with_losses_of_each_problem() -> None:
    M = torch.stack([gk.gramian(conflicting(3, 9)) for _ in range(6)])
    losses = torch.rand(6, 3) + 0.1
    w = gk.Normalized(gk.MGDA(), "loss").weights(M.view(2, 3, 3, 3), losses.view(2, 3, 3))
    for k in range(6):
        assert_near(w.view(6, 3)[k], gk.Normalized(gk.MGDA(), "loss").weights(M[k], losses[k]), w.max(), 1e-9)
    assert gk.Normalized(gk.MGDA()).weights(torch.ones(0, 3, 3)).shape == (0, 3)


def test_the_state_within_is_state_and_is_put_back() -> None:
    J = conflicting(3, 9)
    method = gk.Normalized(gk.GradVac(generator=torch.Generator().manual_seed(1)))
    method(J)
    before = method.state_dict()["aggregator.targets"].clone()
    put_back = method.snapshot()
    first = method(J + 1)
    put_back()
    assert torch.equal(method.state_dict()["aggregator.targets"], before)
    assert torch.equal(method(J + 1), first)  # the generator is back too


def test_nothing_is_read() -> None:
    with FakeTensorMode():
        assert gk.Normalized(gk.MGDA()).weights(torch.ones(2, 4, 4)).shape == (2, 4)


def weights(J: Tensor) -> Tensor:
    return gk.Normalized(gk.Sum()).weights(gk.gramian(J))


def test_fixed_weights_become_reciprocals_of_lengths() -> None:
    J = torch.randn(3, 9)
    assert_near(weights(J), 1 / J.double().norm(dim=1), 1.0, 1e-6)

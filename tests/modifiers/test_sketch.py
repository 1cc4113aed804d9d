"""Sketches: what they estimate and how well, their stream of signs, and where a step is in it."""

import copy
import pickle
from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

import gradkern as gk

T, SEEDS = 3, 100


class Twice(nn.Module):
    """A layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


class Flipped(nn.Module):
    """A product with a weight (p, q)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 9))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


TRUNKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 9, bias=False), (15, 12)),
    "flipped": (Flipped, (15, 12)),
    "used twice": (Twice, (15, 12)),
    "tokens": (lambda: nn.Linear(12, 9, bias=False), (5, 3, 12)),
    "convolution": (lambda: nn.Conv2d(3, 5, 3, 2, 1, bias=False), (4, 3, 8, 8)),
    "dilated, along one dimension": (lambda: nn.Conv1d(4, 5, 3, padding="same", dilation=2, bias=False), (4, 4, 9)),
}


def losses_of(trunk: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the losses of T heads without parameters, which conflict."""
    h = trunk(x).flatten(1).tanh()
    targets = torch.linspace(-1, 1, T)
    weights = torch.randn(T, h.shape[1], generator=torch.Generator().manual_seed(1))
    return [(h @ w - t).square().mean() for w, t in zip(weights, targets, strict=True)]


def gramian(trunk: nn.Module, x: Tensor, **way: object) -> Tensor:
    found = gk.backward(
        losses_of(trunk, x),
        trunk,
        aggregator=gk.PCGrad(),
        through="activations",
        **way,  # type: ignore[arg-type]
    ).gramian
    assert found is not None
    return found


def rows(trunk: nn.Module, x: Tensor) -> Tensor:
    """Return the task gradients, (T, P), by torch alone."""
    found = [torch.autograd.grad(loss, list(trunk.parameters()), retain_graph=True) for loss in losses_of(trunk, x)]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in found])


@pytest.fixture(params=TRUNKS)
def problem(request: pytest.FixtureRequest, float64_by_default: None) -> tuple[nn.Module, Tensor]:
    """A trunk of one layer, and its batch."""
    make, shape = TRUNKS[request.param]
    torch.manual_seed(0)
    return make(), torch.randn(shape)


@pytest.mark.parametrize("columns", [1, 4])
def test_it_is_unbiased_and_its_variance_is_as_stated(problem: tuple[nn.Module, Tensor], columns: int) -> None:
    """A mean of n numbers is off by less than five of its standard deviations, and their variance by 80 %."""
    G = rows(*problem)
    exact, lengths = G @ G.T, G.norm(dim=1)
    estimates = torch.stack([gramian(*problem, gramian=gk.Sketch(columns, seed)) for seed in range(SEEDS)])
    bound = 2 * lengths.unsqueeze(1).square() * lengths.square() / columns
    assert ((estimates.mean(0) - exact).abs() <= 5 * (bound / SEEDS).sqrt()).all()
    assert (estimates.var(0) <= 1.8 * bound).all()
    assert (estimates.var(0) > 0).all()


@pytest.mark.parametrize("columns", [12, 100])
def test_a_layer_with_no_more_numbers_than_columns_is_exact(columns: int, float64_by_default: None) -> None:
    """Rounding alone is left, 1e-12 of the largest entry."""
    torch.manual_seed(0)
    trunk, x = nn.Linear(12, 9), torch.randn(15, 12)
    G = rows(trunk, x)
    found = gramian(trunk, x, gramian=gk.Sketch(columns, seed=0))
    torch.testing.assert_close(found, G @ G.T, rtol=0, atol=1e-12 * float((G @ G.T).abs().max()))


def test_the_update_is_that_of_the_estimate(problem: tuple[nn.Module, Tensor]) -> None:
    """Its weights are those of the Gramian in ``info``, and the rows are combined by them: rounding alone is left."""
    trunk, x = problem
    G, method = rows(trunk, x), gk.PCGrad(order=range(T))
    for finish in ("backward", "kept"):
        trunk.zero_grad()
        way = {"through": "activations", "finish": finish, "gramian": gk.Sketch(2, seed=3)}
        info = gk.backward(losses_of(trunk, x), trunk, aggregator=method, **way)  # type: ignore[arg-type]
        assert info.gramian is not None
        assert not torch.allclose(info.gramian, G @ G.T, rtol=1e-3)
        found = torch.cat([p.grad.flatten() for p in trunk.parameters() if p.grad is not None])
        expected = method.weights(info.gramian) @ G
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


def test_each_layer_and_each_step_has_signs_of_its_own() -> None:
    sketch, cpu = gk.Sketch(8, seed=5), torch.device("cpu")
    first, other = (sketch.signs(layer, 32, torch.float64, cpu) for layer in (0, 1))
    sketch.advance()
    later = sketch.signs(0, 32, torch.float64, cpu)
    for S in (first, other, later):
        assert set((S * 8**0.5).round(decimals=9).unique().tolist()) == {-1.0, 1.0}
    for a, b in combinations((first, other, later), 2):
        assert (a == b).double().mean().item() == pytest.approx(0.5, abs=0.16)  # 5 σ of 256 coins


def optimizer(trunk: nn.Module, seed: int) -> gk.SurgeryOptimizer:
    inner = torch.optim.SGD(trunk.parameters(), lr=0.1)
    return gk.SurgeryOptimizer(inner, gk.PCGrad(order=range(T)), through="activations", gramian=gk.Sketch(2, seed))


def update(opt: gk.SurgeryOptimizer, trunk: nn.Module, x: Tensor) -> Tensor:
    found = opt.update(losses_of(trunk, x)).gramian
    assert found is not None
    return found


def loaded(opt: gk.SurgeryOptimizer, trunk: nn.Module) -> gk.SurgeryOptimizer:
    """Return a new optimizer with another seed that has loaded the state."""
    other = optimizer(trunk, seed=99)
    other.load_state_dict(opt.state_dict())
    return other


def test_a_resumed_run_goes_on_with_the_same_signs(float64_by_default: None) -> None:
    torch.manual_seed(0)
    trunk, x = nn.Linear(12, 9), torch.randn(15, 12)
    opt = optimizer(trunk, seed=4)
    update(opt, trunk, x)
    resumed, state = loaded(opt, trunk), copy.deepcopy(trunk.state_dict())
    assert resumed.state_dict()["surgery"]["sketch"] == {"seed": 4, "step": 1}
    expected = update(opt, trunk, x)
    trunk.load_state_dict(state)
    assert update(resumed, trunk, x).equal(expected)


def test_a_pickled_optimizer_is_where_it_was(float64_by_default: None) -> None:
    torch.manual_seed(0)
    trunk, x = nn.Linear(12, 9), torch.randn(15, 12)
    opt = optimizer(trunk, seed=4)
    update(opt, trunk, x)
    other, of_other = pickle.loads(pickle.dumps((trunk, opt)))
    assert update(of_other, other, x).equal(update(opt, trunk, x))


def test_a_step_that_raises_does_not_move_it(float64_by_default: None) -> None:
    trunk, x = nn.Linear(12, 9), torch.randn(15, 12)
    opt = optimizer(trunk, seed=4)

    def refuse(g: Tensor) -> Tensor:
        raise ArithmeticError

    h = trunk(x)
    h.register_hook(refuse)
    with pytest.raises(ArithmeticError):
        opt.update([(h - t).square().mean() for t in range(T)])
    assert opt.state_dict()["surgery"]["sketch"]["step"] == 0
    assert all(p.grad is None for p in trunk.parameters())


@pytest.mark.parametrize("finish", ["backward", "kept"])
@pytest.mark.parametrize("groups", ["model", "parameter"])
def test_a_report_tells_the_share_of_pairs_that_agree(finish: str, groups: str, float64_by_default: None) -> None:
    """It follows from torch's own gradients and the estimate in ``info``. 20 seeds have more than one share."""
    if groups != "model" and finish == "backward":
        pytest.skip("groups need finish='kept'")
    torch.manual_seed(0)
    trunk, x = nn.Sequential(nn.Linear(12, 9, bias=False), nn.Tanh(), nn.Linear(9, 7, bias=False)), torch.randn(15, 12)
    found = [torch.autograd.grad(loss, list(trunk.parameters()), retain_graph=True) for loss in losses_of(trunk, x)]
    of_params = [torch.stack([g.flatten() for g in column]) for column in zip(*found, strict=True)]
    each = torch.stack([G @ G.T for G in of_params])
    exact = each if groups == "parameter" else each.sum(0, keepdim=True)
    shares = set()
    for seed in range(20):
        sketch = gk.Sketch(1, seed, report=True)
        way = {"through": "activations", "finish": finish, "gramian": sketch}
        info = gk.backward(losses_of(trunk, x), trunk, aggregator=gk.PCGrad(), groups=groups, **way)  # type: ignore[arg-type]
        assert info.gramian is not None
        assert info.conflict_agreement is not None
        M = info.gramian.reshape(exact.shape)
        pairs = [(k, i, j) for k in range(len(M)) for i, j in combinations(range(T), 2)]
        agree = [bool((M[at] < 0) == (exact[at] < 0)) for at in pairs]
        assert info.conflict_agreement.item() == pytest.approx(sum(agree) / len(agree))
        shares.add(sum(agree))
    assert len(shares) > 1


def test_without_a_report_there_is_none(float64_by_default: None) -> None:
    trunk = nn.Linear(4, 3)
    info = gk.backward(losses_of(trunk, torch.randn(5, 4)), trunk, aggregator=gk.PCGrad(), through="activations")
    assert info.conflict_agreement is None

"""Running means of a method's weights: as Zhou et al. 2022 say, as TorchJD has them, and what moves them."""

import copy

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import gradkern as gk
from tests.problems import conflicting
from tests.tolerances import assert_near


def gramians(n: int, T: int = 3) -> list[Tensor]:
    return [gk.gramian(conflicting(T, 9)) for _ in range(n)]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("T", [1, 2, 3, 8, 20, 40])
def test_the_weights_are_running_means(T: int, decay: float) -> None:
    torch.manual_seed(T)
    method, mean = gk.Smoothed(gk.MGDA(), decay), None
    for M in gramians(4, T):
        w = gk.MGDA().weights(M)
        mean = w if mean is None else decay * mean + (1 - decay) * w
        assert_near(method.weights(M), mean, 1.0, 1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_as_torchjd(decay: float) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    ours = gk.Smoothed(gk.MGDA(), decay)

    class Within(aggregation.Weighting):  # type: ignore[misc]  # TorchJD's own MGDA is inexact
        def forward(self, M: Tensor) -> Tensor:
            return gk.MGDA().weights(M)

    theirs = aggregation.CRMOGMWeighting(Within(), alpha=decay)
    torch.manual_seed(0)
    for _ in range(4):
        M = gk.gramian(conflicting(3, 9))
        assert_near(ours.weights(M), theirs(M), 1.0, 1e-12)


def test_a_step_that_is_not_finite_moves_no_mean_and_shows() -> None:
    method, (first, second) = gk.Smoothed(gk.MGDA()), gramians(2)
    method.weights(torch.stack([first, second]))
    before = method.mean.clone()
    for bad in (torch.nan, torch.inf):
        broken = torch.stack([first, second])
        broken[0, 1, 1] = bad
        w = method.weights(broken)
        assert w[0].isnan().all()
        assert w[1].isfinite().all()
        assert torch.equal(method.mean, before)


def test_a_first_step_that_is_not_finite_starts_nothing() -> None:
    method, (M,) = gk.Smoothed(gk.MGDA()), gramians(1)
    method.weights(M * torch.nan)
    assert torch.equal(method.weights(M), gk.MGDA().weights(M))


def test_absent_tasks_wait() -> None:
    method, (first, second, third) = gk.Smoothed(gk.MGDA(), 0.5), (M[None] for M in gramians(3))
    present = torch.tensor([True, False, True])
    w_1 = gk.MGDA().solution(first, present).weights
    assert_near(method.solution(first, present).weights, w_1, 1.0, 1e-12)
    assert method.mean[0].isnan().tolist() == [False, True, False]
    w_2, w = gk.MGDA().weights(second), method.solution(second, None).weights
    assert_near(w[0, [0, 2]], 0.5 * (w_1 + w_2)[0, [0, 2]], 1.0, 1e-12)
    assert_near(w[0, 1], w_2[0, 1], 1.0, 1e-12)  # its first step
    third[:, 1], third[:, :, 1] = torch.nan, torch.nan
    before = method.mean.clone()
    w = method.solution(third, present).weights
    assert w[0, 1] == 0
    assert w.isfinite().all()
    assert method.mean[0, 1] == before[0, 1]
    assert (method.mean[0, [0, 2]] != before[0, [0, 2]]).any()


def test_remembered_gradients_are_projected_onto_with_the_weights_of_the_step() -> None:
    """PCGrad's weight of an absent task is that of the projections onto it."""
    (M,), present = gramians(1), torch.tensor([True, False, True])
    expected = gk.PCGrad("average").solution(M[None], present).weights
    assert expected[0, 1] != 0
    assert torch.equal(gk.Smoothed(gk.PCGrad("average")).solution(M[None], present).weights, expected)


def test_a_step_that_raises_puts_all_states_back() -> None:
    """The mean, and GradVac's targets and generator."""
    p = torch.nn.Parameter(torch.randn(9, dtype=torch.float64))

    def losses() -> list[Tensor]:
        return [(p * torch.arange(9.0) - t).square().sum() for t in range(3)]

    method = gk.Smoothed(gk.GradVac(generator=torch.Generator().manual_seed(1)))
    opt = gk.SurgeryOptimizer(torch.optim.SGD([p], lr=0.01), method)
    opt.update(losses())
    before = copy.deepcopy(opt.state_dict())

    def broken(*_: object) -> None:
        raise KeyboardInterrupt

    hook = opt.optimizer.register_step_pre_hook(broken)
    with pytest.raises(KeyboardInterrupt):
        opt.update(losses())
    hook.remove()
    after = opt.state_dict()
    for name, value in before["surgery"]["state"].items():
        assert value is None or torch.equal(after["surgery"]["state"][name], value), name


def test_resumed_in_a_fresh_optimizer_it_goes_on_exactly() -> None:
    def run(opt: gk.SurgeryOptimizer, p: torch.nn.Parameter, steps: range) -> None:
        for k in steps:
            opt.update([(p - k + t).square().sum() * (1 + t) for t in range(3)])

    params = [torch.nn.Parameter(torch.arange(5.0)) for _ in range(2)]
    opts = [gk.SurgeryOptimizer(torch.optim.SGD([p], lr=0.01), gk.Smoothed(gk.MGDA("l2"))) for p in params]
    run(opts[0], params[0], range(3))
    opts[1].load_state_dict(copy.deepcopy(opts[0].state_dict()))
    with torch.no_grad():
        params[1].copy_(params[0])
    for opt, p in zip(opts, params, strict=True):
        run(opt, p, range(3, 6))
    assert torch.equal(*params)


def test_groups_that_are_added_start_fresh_and_none_may_go() -> None:
    method, (first, second) = gk.Smoothed(gk.MGDA(), 0.5), gramians(2)
    method.weights(first)
    w = method.weights(torch.stack([first, second]))
    assert_near(w, gk.MGDA().weights(torch.stack([first, second])), 1.0, 1e-12)
    with pytest.raises(ValueError, match=r"mean of Smoothed is of 3 tasks in 2 group\(s\).*3 tasks in 1 group"):
        method.weights(first)
    with pytest.raises(ValueError, match="this step has 2 tasks"):
        method.weights(first[:2, :2])


def test_the_means_keep_their_digits() -> None:
    method = gk.Smoothed(gk.MGDA())
    method.weights(gramians(1)[0])
    before = method.mean.clone()
    assert torch.equal(method.half().mean, before)
    fresh = gk.Smoothed(gk.MGDA())
    fresh.load_state_dict(method.state_dict())
    assert torch.equal(fresh.mean, before)


@pytest.mark.parametrize("state", [torch.ones(3), torch.ones(1, 2), torch.ones(1, 3).long(), "x"])
def test_a_state_that_does_not_fit_changes_nothing(state: object) -> None:
    method = gk.Smoothed(gk.MGDA())
    method.weights(gramians(1)[0])
    before = method.mean.clone()
    with pytest.raises((TypeError, ValueError), match="mean in state_dict must be"):
        method.load_state_dict(method.state_dict() | {"mean": state})
    assert torch.equal(method.mean, before)


def test_a_state_from_before_the_first_step_starts_anew() -> None:
    method, (M,) = gk.Smoothed(gk.MGDA()), gramians(1)
    empty = copy.deepcopy(method.state_dict())
    method.weights(M)
    method.load_state_dict(empty)
    assert method.mean is None


@pytest.mark.parametrize("within", [gk.Sum(), gk.Constant([1.0, 2.0]), gk.GradAttention(4)])
def test_a_method_that_it_cannot_be_around_is_named(within: gk.Aggregator) -> None:
    with pytest.raises(ValueError, match=f"aggregator must look at the Gramian.*{type(within).__name__}"):
        gk.Smoothed(within)


def test_losses_go_to_the_method_within() -> None:
    (M,), losses = gramians(1), torch.tensor([1.0, 2.0, 0.5])
    assert gk.Smoothed(gk.MGDA("loss")).needs_losses
    assert_near(gk.Smoothed(gk.MGDA("loss")).weights(M, losses), gk.MGDA("loss").weights(M, losses), 1.0, 1e-12)


def test_calls_without_numbers_leave_the_means_alone() -> None:
    method = gk.Smoothed(gk.MGDA())
    with FakeTensorMode():
        assert method.weights(torch.ones(2, 3, 3)).shape == (2, 3)
    assert method.mean is None
    method.weights(gramians(1)[0])
    before = method.mean.clone()
    method.weights(torch.ones(4, 4, device="meta"))
    assert torch.equal(method.mean, before)


def test_in_inference_mode_the_means_stay_of_use() -> None:
    method = gk.Smoothed(gk.MGDA())
    with torch.inference_mode():
        method.weights(gramians(1)[0])
    method.weights(gramians(1)[0])
    method.mean.mul_(1.0)

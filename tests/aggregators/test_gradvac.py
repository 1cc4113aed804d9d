"""GradVac: its targets, on Gramians and in training."""

import io
import math

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
from tests.interpreter import interpreted
from tests.models import problem
from tests.problems import conflicting
from tests.tolerances import assert_near

EPS = torch.finfo(torch.float64).eps


def with_targets(targets: Tensor, **arguments: object) -> gk.GradVac:
    method = gk.GradVac(**arguments)
    method.load_state_dict({"targets": targets.double().reshape(-1, *targets.shape[-2:])}, strict=False)
    return method


def pairs_of_two(target: float) -> Tensor:
    return torch.tensor([[0.0, target], [target, 0.0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", [-0.9, -0.3, 0.0, 0.4, 0.99])
def test_the_corrected_cosine_hits_the_target(target: float, dtype: torch.dtype, back_end: str) -> None:
    corrected = 0
    for seed in range(8):
        torch.manual_seed(seed)
        J = conflicting(2, 30).to(dtype)
        C = with_targets(pairs_of_two(target), order=[0, 1]).coefficients(gk.gramian(J))
        modified = C.double() @ J.double()
        for i, j in ((0, 1), (1, 0)):
            before, after = reference.cosine(J[i], J[j]), reference.cosine(modified[i], J[j])
            # 1e-6: the requirement; float32 products of 30 terms are good for it.
            assert abs(after - max(before, target)) < 1e-6
            corrected += before < target
    assert corrected > 0 or target < 0


@pytest.mark.parametrize("T", [1, 2, 3, 8])
def test_targets_that_stay_zero_make_it_pcgrad(T: int, back_end: str) -> None:
    M = gk.gramian(conflicting(T, 40))
    order = [torch.randperm(T).tolist() for _ in range(T)]
    expected = gk.PCGrad(order=order).coefficients(M)
    # 1e-12: the same quotients by another road, through cosines.
    assert_near(gk.GradVac(beta=0.0, order=order).coefficients(M), expected, expected.abs().max(), 1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.01, 0.5, 1.0])
@pytest.mark.parametrize("T", [2, 3, 6])
def test_many_steps_as_the_paper_says(T: int, beta: float, back_end: str) -> None:
    method = gk.GradVac(beta=beta, order=list(range(T)))
    targets = torch.zeros(T, T)
    for _ in range(4 if back_end == "triton" else 12):
        J = conflicting(T, 40)
        modified, targets = reference.gradvac(J, [list(range(T))] * T, targets, beta, EPS)
        # 1e-8: with beta 1 a target is the last cosine, and roundings are carried from step to step.
        assert_near(method.coefficients(gk.gramian(J)) @ J, torch.stack(modified), J.norm() * T, 1e-8)
        assert method.targets is not None
        assert_near(method.targets[0], targets, 1.0, 1e-8)


def test_more_tasks_than_are_taken_one_by_one() -> None:
    test_many_steps_as_the_paper_says(14, 0.5, "pytorch")


def test_targets_move_whether_corrected_or_not() -> None:
    """An average that moved in corrected steps only could do nothing but fall."""
    J = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    method = gk.GradVac(beta=0.5, order=[0, 1])
    method.weights(gk.gramian(J))
    assert method.targets is not None
    expected = 0.5 * math.sqrt(0.5) * torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    assert_near(method.targets[0], expected, 1.0, 1e-6)  # a float32 Gramian


def test_a_pair_with_a_zero_gradient_is_left_alone(back_end: str) -> None:
    J = conflicting(3, 20)
    J[1] = 0
    targets = torch.full((3, 3), 0.7)
    method = with_targets(targets, beta=0.5, order=[0, 1, 2])
    C = method.coefficients(gk.gramian(J))
    assert method.targets is not None
    untouched = torch.tensor([[True, True, False], [True, True, True], [False, True, True]])
    assert torch.equal(method.targets[0] == targets, untouched)
    assert torch.equal(C[1], torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, in the interpreter
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_step_that_is_not_finite_leaves_every_target_alone(bad: float, back_end: str) -> None:
    method = gk.GradVac(beta=0.5, order=[0, 1, 2])
    M = torch.stack([gk.gramian(conflicting(3, 20)) for _ in range(4)])
    method.weights(M)
    assert method.targets is not None
    before = method.targets.clone()
    broken = M.clone()
    broken[2, 0, 1] = broken[2, 1, 0] = bad
    method.weights(broken)
    assert torch.equal(method.targets, before)
    method.weights(M)
    assert not torch.equal(method.targets, before)


def test_an_overflowed_step_under_amp_leaves_the_state_alone() -> None:
    model, x, y = problem()
    method = gk.GradVac(beta=0.5)
    opt = gk.SurgeryOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1), method, groups="parameter")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    states = []
    for overflow in (False, True, False):
        opt.zero_grad()
        losses = model.losses(x, y)
        if overflow:
            losses[1] = losses[1] * torch.inf
        opt.backward([scaler.scale(loss) for loss in losses])
        scaler.step(opt)
        scaler.update()
        assert method.targets is not None
        states.append(method.targets.clone())
    assert torch.equal(states[0], states[1])
    assert states[2].isfinite().all()
    assert not torch.equal(states[1], states[2])
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_groups_are_one_problem_each(back_end: str) -> None:
    """All of them in one call, and as a loop over instances does."""
    model, x, y = problem()
    trunk = list(model.trunk.named_parameters())
    together = gk.GradVac(beta=0.3, order=[0, 1, 2])
    alone = [gk.GradVac(beta=0.3, order=[0, 1, 2]) for _ in trunk]
    for _ in range(3):
        model.zero_grad()
        info = gk.backward(model.losses(x, y), trunk, aggregator=together, groups="parameter")
        results = [p.grad.clone() for _, p in trunk]
        assert info.targets is not None
        for k, (name, p) in enumerate(trunk):
            p.grad = None
            one = gk.backward(model.losses(x, y), [(name, p)], aggregator=alone[k])
            assert torch.equal(p.grad, results[k])
            assert one.targets is not None
            assert torch.equal(info.targets[k], one.targets)
        with torch.no_grad():
            for (_, p), g in zip(trunk, results, strict=True):
                p -= 0.05 * g


def test_groups_that_are_added_start_fresh() -> None:
    method = gk.GradVac(beta=0.5)
    M = torch.stack([gk.gramian(conflicting(3, 20)) for _ in range(4)])
    method.weights(M[:2])
    assert method.targets is not None
    before = method.targets.clone()
    fresh = gk.GradVac(beta=0.5, order=[0, 1, 2])
    fresh.weights(M[2:])
    method.order, method._keys = fresh.order, fresh._keys
    method.weights(torch.cat((torch.zeros_like(M[:2]), M[2:])))  # nothing reaches the old groups in this step
    assert torch.equal(method.targets[:2], before)
    assert torch.equal(method.targets[2:], fresh.targets)


def test_resumed_in_a_fresh_instance_it_goes_on_exactly() -> None:
    def train(steps: range, state: dict[str, object] | None) -> tuple[list[Tensor], dict[str, object]]:
        model, x, y = problem()
        method = gk.GradVac(beta=0.2, generator=torch.Generator().manual_seed(3))
        opt = gk.SurgeryOptimizer(torch.optim.Adam(model.named_parameters(), lr=0.05), method, groups="module")
        if state is not None:
            model.load_state_dict(state["model"])
            opt.load_state_dict(state["opt"])
        for k in steps:
            opt.zero_grad()
            opt.backward([loss * (1 + k * t) for t, loss in enumerate(model.losses(x, y))])
            opt.step()
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, file)
        file.seek(0)
        return [p.detach() for p in model.parameters()], torch.load(file, weights_only=True)

    through, _ = train(range(6), None)
    _, halfway = train(range(3), None)
    resumed, _ = train(range(3, 6), halfway)
    assert all(torch.equal(a, b) for a, b in zip(through, resumed, strict=True))


def test_the_targets_keep_their_digits() -> None:
    method = gk.GradVac(beta=0.5)
    method.weights(gk.gramian(conflicting(3, 20)))
    assert method.targets is not None
    before = method.targets.clone()
    for change in (method.half, method.float, lambda: method.to(torch.bfloat16)):
        change()
        assert method.targets.dtype == torch.float64
        assert torch.equal(method.targets, before)


def test_another_number_of_tasks_is_refused() -> None:
    method = gk.GradVac()
    method.weights(torch.eye(3))
    with pytest.raises(ValueError, match=r"M is of 1 group\(s\) of 4 tasks, the targets are of shape \(1, 3, 3\)"):
        method.weights(torch.eye(4))
    method.weights(torch.eye(3).expand(2, 3, 3))
    with pytest.raises(ValueError, match=r"M is of 1 group\(s\) of 3 tasks, the targets are of shape \(2, 3, 3\)"):
        method.weights(torch.eye(3))


def test_repr_is_exact() -> None:
    for text in (
        "GradVac(beta=0.01, order=None, reduction='sum')",
        "GradVac(beta=1.0, order=[[1, 0], [0, 1]], reduction='mean')",
    ):
        assert repr(eval(text, {"GradVac": gk.GradVac})) == text


@given(st.one_of(st.floats(), st.integers(), st.booleans(), st.text(), st.none()))
def test_what_is_no_beta_is_named(beta: object) -> None:
    if isinstance(beta, (int, float)) and not isinstance(beta, bool) and 0 <= beta <= 1:
        assert gk.GradVac(beta=beta).beta == beta
    else:
        with pytest.raises((TypeError, ValueError), match=r"beta must be a number.*, got "):
            gk.GradVac(beta=beta)


@settings(max_examples=100)
@given(
    hnp.arrays(np.float64, (3, 6), elements=st.floats(-10, 10).map(lambda x: round(x, 3))),
    st.lists(st.floats(-1, 1), min_size=9, max_size=9),
)
def test_nothing_finite_gives_anything_else(rows: np.ndarray, targets: list[float]) -> None:
    method = with_targets(torch.tensor(targets).view(3, 3), beta=0.5)
    w = method.weights(gk.gramian(torch.from_numpy(rows)))
    assert w.isfinite().all()
    assert method.targets is not None
    assert (method.targets.abs() <= 1).all()


def test_a_step_that_raises_leaves_no_targets() -> None:
    method = gk.GradVac(order=[0, 1, 2])
    with pytest.raises(ValueError, match="order is for 3 tasks, M has 2"):
        method.weights(torch.eye(2))
    assert method.targets is None
    method.weights(torch.eye(3))


def test_calls_without_numbers_leave_the_targets_alone() -> None:
    M = gk.gramian(conflicting(3, 20))
    method, undisturbed = (gk.GradVac(0.5, order=[0, 1, 2]) for _ in range(2))
    for _ in range(2):
        with FakeTensorMode():
            assert method.weights(torch.eye(3)).shape == (3,)
        assert method.weights(M.to("meta")).shape == (3,)
        with torch.inference_mode():
            w = method.weights(M)
        assert torch.equal(w, undisturbed.weights(M))
    assert method.targets is not None
    assert torch.equal(method.targets, undisturbed.targets)


@pytest.mark.parametrize(
    ("state", "error"),
    [({"targets": torch.ones(2, 3)}, ValueError), ({"targets": torch.ones(1, 3, 3), "more": 1}, RuntimeError)],
)
def test_a_state_that_does_not_fit_changes_nothing(state: dict[str, object], error: type[Exception]) -> None:
    method = gk.GradVac(0.5)
    method.weights(gk.gramian(conflicting(2, 20)))
    assert method.targets is not None
    before = method.targets.clone()
    with pytest.raises(error, match=r"targets|more"):
        method.load_state_dict({"_extra_state": None, **state})
    assert torch.equal(method.targets, before)
    method.load_state_dict({}, strict=False)
    assert torch.equal(method.targets, before)
    method.load_state_dict(gk.GradVac().state_dict())
    assert method.targets is None


@interpreted
@pytest.mark.parametrize("groups", ["model", "parameter"])
def test_one_operator_serves_all_groups(groups: str, triton_serves_the_cpu: list[str]) -> None:
    model, x, y = problem()
    gk.backward(model.losses(x, y), model, aggregator=gk.GradVac(), groups=groups)
    assert triton_serves_the_cpu == ["gramian.tensors", "gradvac", "combine.tensors"]


def test_no_groups_at_all() -> None:
    assert gk.GradVac().weights(torch.empty(0, 3, 3)).shape == (0, 3)
    assert gk.PCGrad().weights(torch.empty(0, 3, 3)).shape == (0, 3)

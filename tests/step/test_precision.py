"""Numbers keep the precision of their own parameters, whatever the other parameters of a step are."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import gradkern as gk

F32, F64 = torch.float32, torch.float64

pytestmark = pytest.mark.usefixtures("back_end")


# Fixed weights


def by_backward(losses: list[Tensor], params: list[nn.Parameter], method: gk.Aggregator) -> gk.SurgeryInfo:
    return gk.backward(losses, params, aggregator=method, suppression=gk.Suppression(0.0))


def by_conflict_lr(losses: list[Tensor], params: list[nn.Parameter], method: gk.Aggregator) -> gk.SurgeryInfo:
    opt = gk.SurgeryOptimizer(torch.optim.SGD(params, lr=1.0), method, conflict_lr=gk.ConflictLR())
    return opt.backward(losses)


def by_torch(losses: list[Tensor], params: list[nn.Parameter], method: gk.Aggregator) -> gk.SurgeryInfo:
    return gk.backward(losses, params, aggregator=method)


WEIGHTS = [
    (gk.Sum([0.1, 0.7]), [0.1, 0.7]),
    (gk.Constant([0.1, 0.7]), [0.1, 0.7]),
    (gk.Mean(), [0.5, 0.5]),
]


@pytest.mark.parametrize("step", [by_backward, by_conflict_lr, by_torch])
@pytest.mark.parametrize(("method", "weights"), WEIGHTS, ids=["Sum", "Constant", "Mean"])
@pytest.mark.parametrize("shared_dtype", [F32, torch.bfloat16, F64])
def test_fixed_weights_are_not_rounded_for_float64_parameters(
    shared_dtype: torch.dtype,
    method: gk.Aggregator,
    weights: list[float],
    step: Callable[..., gk.SurgeryInfo],
    device: torch.device,
) -> None:
    trunk = nn.Parameter(torch.ones(3, dtype=shared_dtype, device=device))
    heads = [nn.Parameter(torch.ones(2, dtype=F64, device=device)) for _ in range(2)]
    losses = [trunk.sum().double() + head.sum() for head in heads]
    info = step(losses, [trunk, *heads], method)
    for head, w in zip(heads, weights, strict=True):
        assert head.grad.tolist() == [w, w]
    # A unit in the last place: Triton's interpreter truncates what it stores in bfloat16.
    assert trunk.grad.tolist() == pytest.approx([sum(weights)] * 3, rel=torch.finfo(shared_dtype).eps)
    if step is by_torch:
        assert info.weights.tolist() == weights


@pytest.mark.parametrize("step", [by_backward, by_torch])
def test_a_mean_of_three_is_a_third(step: Callable[..., gk.SurgeryInfo]) -> None:
    trunk, head = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, dtype=F64))
    step([trunk.sum() + head.sum(), trunk.sum(), 2 * trunk.sum()], [trunk, head], gk.Mean())
    assert head.grad.tolist() == [1 / 3, 1 / 3]


# GradVac


def rounded_to_nothing(seed: int, device: torch.device) -> Tensor:
    """Three float32 gradients: the first two are antiparallel but for the rounding of their numbers."""
    torch.manual_seed(seed)
    g, h = torch.randn(2, 200, device=device)
    return torch.stack((g, -0.1 * g, h))


seeds = pytest.mark.parametrize("seed", range(6))
"""Rounding gives the square of what is left either sign, and a negative one counts as 0 in any dtype."""


@seeds
@pytest.mark.parametrize("groups", ["parameter", "model"])
def test_what_is_left_of_float32_rows_is_rounding_beside_float64_rows(
    groups: str, seed: int, device: torch.device
) -> None:
    """In one group with float32 rows, float64 ones make the group no more precise."""
    J = rounded_to_nothing(seed, device)
    p = nn.Parameter(torch.zeros(200, device=device))
    q = nn.Parameter(torch.zeros(1, dtype=F64, device=device))
    small = 1e-9 if groups == "model" else 1.0
    losses = [row @ p + (small * (t + 1.0) * q).sum() for t, row in enumerate(J)]
    method = gk.GradVac(0.5, order=[0, 1, 2])
    info = gk.backward(losses, [("p", p), ("q", q)], aggregator=method, groups=groups)
    assert info.gramian.dtype == F64
    targets = method.targets[0]
    assert targets[0, 1] == pytest.approx(-0.5, abs=1e-6)  # half of the cosine, as beta says
    assert targets[0, 2] == targets[1, 2] == 0.0


@seeds
@pytest.mark.parametrize("clipped", [False, True])
def test_what_is_left_of_float32_rows_is_rounding_beside_a_float64_head(
    clipped: bool, seed: int, device: torch.device
) -> None:
    """A norm to clip takes dot products over the head too."""
    J = rounded_to_nothing(seed, device)
    p = nn.Parameter(torch.zeros(200, device=device))
    head = nn.Parameter(torch.zeros(1, dtype=F64, device=device))
    method = gk.GradVac(0.5, order=[0, 1, 2])
    opt = gk.SurgeryOptimizer(gk.optim.AdamW([p, head]), method)
    losses = [J[0] @ p + head.sum(), J[1] @ p, J[2] @ p]
    opt.update(losses, max_norm=1.0 if clipped else None)
    assert method.targets[0, 0, 2] == method.targets[0, 1, 2] == 0.0


def test_each_group_aims_at_what_its_own_dtype_resolves(device: torch.device) -> None:
    """Targets have reached 1, and gradients are perpendicular."""
    p = nn.Parameter(torch.zeros(2, device=device))
    q = nn.Parameter(torch.zeros(2, dtype=F64, device=device))
    method = gk.GradVac(0.5)
    method.load_state_dict({"targets": torch.ones(2, 2, 2, dtype=F64)}, strict=False)
    gk.backward([p[0] + q[0], p[1] + q[1]], [("p", p), ("q", q)], aggregator=method, groups="parameter")
    for x in (p, q):
        u = 1 - math.sqrt(torch.finfo(x.dtype).eps)
        expected = 1 + u / math.sqrt(1 - u * u)
        # The largest error of a cosine of 1 - √ε that is computed in float64.
        assert x.grad.tolist() == pytest.approx([expected] * 2, rel=1e-7)

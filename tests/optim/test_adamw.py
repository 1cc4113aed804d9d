"""gradkern.optim.AdamW against torch.optim.AdamW(fused=True), on .grad and along combinations."""

import copy
import math
import pickle
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradkern as gk
from gradkern import reference
from gradkern.optim import AdamW
from tests import interpreter
from tests.tolerances import assert_near

OPTIONS: list[dict[str, Any]] = [
    {},
    {"amsgrad": True, "eps": 1e-4},
    {"maximize": True, "weight_decay": 0.3},
    {"lr": torch.tensor(0.02), "betas": (0.0, 0.5)},
    {"lr": 0.02, "weight_decay": 0.0, "capturable": True},
]
SHAPES = [(4097,), (3, 5), (1,), ()]
"""A tile and one more, and the least."""


CPU = torch.device("cpu")


@pytest.fixture(
    params=[
        "pytorch",
        pytest.param("triton", marks=interpreter.interpreted),
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, served by each back end in turn, and a GPU."""
    if request.param == "triton":
        request.getfixturevalue("triton_serves_the_cpu")
    return torch.device("cuda" if request.param == "cuda" else "cpu")


def interpreted(request: pytest.FixtureRequest) -> bool:
    """Whether Triton's interpreter runs the kernels, which takes its time."""
    return "triton_serves_the_cpu" in request.fixturenames


def parameters(dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    wide = [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES]
    return [nn.Parameter(p.to(device, dtype)) for p in wide]


def draw(params: Sequence[Tensor], scale: float = 1.0) -> list[Tensor]:
    return [scale * torch.randn(p.shape, dtype=torch.float64).to(p.device, p.dtype) for p in params]


def give(params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()


def assert_same(a: Sequence[Tensor], b: Sequence[Tensor], tolerance: float) -> None:
    for p, q in zip(a, b, strict=True):
        assert_near(p.detach(), q.detach(), 1.0, tolerance)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_hundred_steps_are_torchs(
    options: dict[str, Any], device: torch.device, request: pytest.FixtureRequest
) -> None:
    ours, theirs = parameters(device=device), parameters(device=device)
    mine, other = AdamW(ours, **options), torch.optim.AdamW(theirs, fused=True, **options)
    for k in range(10 if interpreted(request) else 100):
        grads = draw(ours, 10.0 ** (k % 5 - 2))
        for params, optimizer in ((ours, mine), (theirs, other)):
            give(params, grads)
            optimizer.step()
    # Numbers of size 1 that a hundred steps change by up to 0.02 each, every one rounded at 6e-8.
    assert_same(ours, theirs, 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_round_the_parameter_alone(dtype: torch.dtype, device: torch.device) -> None:
    """Step by step beside torch's in float32 (float64), started from the same rounded parameters."""
    ours = parameters(dtype, device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mine = AdamW(ours, lr=0.1)
    shadow = [nn.Parameter(p.detach().to(wide)) for p in ours]
    other = torch.optim.AdamW(shadow, lr=0.1, fused=True)
    for _ in range(5):
        grads = draw(ours)
        give(ours, grads)
        give(shadow, [g.to(wide) for g in grads])
        mine.step()
        other.step()
        for p, q in zip(ours, shadow, strict=True):
            # One rounding of numbers up to 4: a unit in the last place, where the interpreter truncates bfloat16.
            assert_near(p.detach(), q.detach(), q.detach().abs() + 1e-3, 2 * torch.finfo(dtype).eps)
            q.data.copy_(p.detach())
    assert {state["exp_avg"].dtype for state in mine.state.values()} == {wide}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_to_torchs_and_back(dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    mine, other = AdamW(ours, lr=0.5, amsgrad=True), torch.optim.AdamW(theirs, lr=0.5, amsgrad=True)
    for _ in range(3):
        give(theirs, draw(theirs))
        other.step()
    mine.load_state_dict(other.state_dict())
    for p, q in zip(ours, theirs, strict=True):
        p.data.copy_(q.data)
        assert {k: v.dtype for k, v in mine.state[p].items()} == dict.fromkeys(other.state[q], torch.float32)
        assert all(torch.equal(v, other.state[q][k].float()) for k, v in mine.state[p].items())
    other.load_state_dict(copy.deepcopy(mine.state_dict()))  # torch takes over the very tensors
    grads, begun = draw(ours), [p.detach().clone() for p in ours]
    for params, optimizer in ((ours, mine), (theirs, other)):
        give(params, grads)
        optimizer.step()
    # In bfloat16 torch rounds at each of its operations, some of 2^-8 on steps of 0.5 and numbers up to 4.
    assert_same(ours, theirs, 1e-5 if dtype == torch.float32 else 5e-2)
    assert (ours[0].detach() - begun[0]).abs().max() > 0.1


def test_its_own_state_loses_nothing() -> None:
    """Moments of 16-bit parameters are float32, and stay it, past a hook that replaces the dictionary."""
    params = parameters(torch.bfloat16)
    optimizer = AdamW(params)
    give(params, draw(params))
    optimizer.step()
    other = AdamW(parameters(torch.bfloat16))
    other.register_load_state_dict_pre_hook(lambda _, state: dict(state))
    other.load_state_dict(optimizer.state_dict())
    assert len(optimizer.state) == len(params)
    for state, loaded in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.float32
        assert all(torch.equal(state[k], loaded[k]) and state[k].dtype == loaded[k].dtype for k in state)
        assert all(state[k].data_ptr() != loaded[k].data_ptr() for k in state)


def test_groups_have_numbers_of_their_own(device: torch.device) -> None:
    ours, theirs = parameters(device=device), parameters(device=device)
    groups = [lambda p: {"params": p[:2], "lr": 0.1}, lambda p: {"params": p[2:], "weight_decay": 0.5, "amsgrad": True}]
    mine = AdamW([group(ours) for group in groups])
    other = torch.optim.AdamW([group(theirs) for group in groups], fused=True)
    for k in range(3):
        grads = draw(ours)
        for params, optimizer in ((ours, mine), (theirs, other)):
            give(params, grads)
            params[1].grad = None if k == 1 else params[1].grad  # a parameter that a step leaves out
            optimizer.step()
    assert_same(ours, theirs, 1e-6)  # float32 steps of 0.1


def test_a_gradient_laid_out_otherwise_and_a_channels_last_parameter(device: torch.device) -> None:
    def made() -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(2)
        weight = torch.randn(2, 3, 4, 4, generator=generator).to(memory_format=torch.channels_last)
        return [nn.Parameter(p.to(device)) for p in (weight, torch.randn(6, 5, generator=generator))]

    ours, theirs = made(), made()
    for params, optimizer in ((ours, AdamW(ours)), (theirs, torch.optim.AdamW(theirs, fused=False))):
        params[0].grad = torch.arange(96.0, device=device).view(2, 3, 4, 4)
        params[1].grad = torch.arange(30.0, device=device).view(5, 6).t()
        optimizer.step()
    assert_same(ours, theirs, 1e-6)  # float32 steps of 1e-3 on numbers up to 4


def test_moments_follow_a_parameter_that_is_laid_out_anew(device: torch.device) -> None:
    """By ``.data``, or by a checkpoint of another memory format: as torch's own step that is not fused."""

    def made() -> list[nn.Parameter]:
        return [nn.Parameter(torch.linspace(-1, 1, 96, device=device).view(2, 3, 4, 4))]

    ours, theirs = made(), made()
    optimizers = (ours, AdamW(ours, lr=0.1)), (theirs, torch.optim.AdamW(theirs, lr=0.1, foreach=True))
    for k in range(4):
        g = torch.randn(2, 3, 4, 4).to(device)
        for params, optimizer in optimizers:
            if k == 1:
                params[0].data = params[0].data.to(memory_format=torch.channels_last)
            params[0].grad = g.clone(memory_format=torch.preserve_format)
            optimizer.step()
            if k == 2:
                state = copy.deepcopy(optimizer.state_dict())
                for name in ("exp_avg", "exp_avg_sq"):
                    state["state"][0][name] = state["state"][0][name].contiguous()
                optimizer.load_state_dict(state)
    assert_same(ours, theirs, 1e-5)  # four float32 steps of 0.1


def test_a_first_moment_that_forgets_all(device: torch.device) -> None:
    """Without decay each moment is the gradient's and its square's alone, whatever came before."""
    p = nn.Parameter(torch.zeros(8, device=device))
    optimizer = AdamW([p], lr=0.1, betas=(0.0, 0.0), weight_decay=0.0)
    for g in (1e6, 1e-4):
        p.grad = torch.full_like(p, g)
        optimizer.step()
    # g / (|g| + eps) twice.
    assert_near(p.detach(), torch.full_like(p, -0.1 - 0.1 * 1e-4 / (1e-4 + 1e-8)).detach(), 0.1, 1e-6)


def test_a_square_beyond_float32_stands_still_and_is_forgotten_by_nobody(device: torch.device) -> None:
    ours, theirs = parameters(device=device), parameters(device=device)
    for params, optimizer in ((ours, AdamW(ours)), (theirs, torch.optim.AdamW(theirs, fused=True))):
        for g in (1e20, 1.0):
            give(params, [torch.full_like(p, g) for p in params])
            optimizer.step()
    assert_same(ours, theirs, 1e-6)  # weight decay alone moves them


def test_copies_step_on() -> None:
    tasks = Tasks()
    opt = gk.SurgeryOptimizer(AdamW(tasks.names), gk.PCGrad(order=[0, 1, 2]))
    opt.update(tasks.losses())
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)), copy.deepcopy(opt.optimizer)):
        params = [p for group in other.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in params]
        give(params, draw(params))
        other.step()
        assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_a_retained_graph_is_not_run_again_past_a_step() -> None:
    tasks = Tasks()
    opt = gk.SurgeryOptimizer(AdamW(tasks.names), gk.PCGrad())
    losses = [p.square().sum() * head.sum() for p, head in zip(tasks.shared, tasks.heads, strict=False)]
    opt.update(losses, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses[0].backward()


@pytest.mark.parametrize(
    ("state", "message"),
    [({"step": 3}, None), ({"exp_avg": torch.zeros(7)}, r"exp_avg of shape \(7,\) for a parameter of \(4097,\)")],
)
def test_what_is_loaded_is_made_to_fit_or_raises(state: dict[str, Any], message: str | None) -> None:
    params = parameters()
    optimizer = AdamW(params)
    give(params, draw(params))
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0].update(state)
    saved["param_groups"][0]["lr"] = 7.0
    if message is None:
        optimizer.load_state_dict(saved)
        assert torch.equal(optimizer.state[params[0]]["step"], torch.tensor(3.0))
    else:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 1e-3


def test_a_parameter_with_gaps_raises_and_its_neighbours_are_untouched() -> None:
    base = torch.zeros(4, 5)
    fine, gaps = nn.Parameter(torch.ones(3)), nn.Parameter(base[:, :3])
    optimizer = AdamW([fine, gaps])
    give([fine, gaps], [torch.ones(3), torch.ones(4, 3)])
    with pytest.raises(ValueError, match=r"shape \(4, 3\) has strides \(5, 1\)"):
        optimizer.step()
    assert torch.equal(fine, torch.ones(3))
    assert not base.any()
    opt = gk.SurgeryOptimizer(AdamW([fine, gaps]), gk.GradVac())
    fine.grad = gaps.grad = None
    with pytest.raises(ValueError, match="with gaps"):
        opt.update([gaps.sum() + fine.sum(), gaps.square().sum() - fine.sum()])
    assert not opt.optimizer.state


def test_a_bad_number_of_a_later_group_raises_before_the_first_has_stepped() -> None:
    params = parameters()
    optimizer = AdamW([{"params": params[:2]}, {"params": params[2:]}])
    optimizer.param_groups[1]["eps"] = "tiny"
    give(params, draw(params))
    with pytest.raises(ValueError, match="tiny"):
        optimizer.step()
    assert_same(params, parameters(), 0.0)
    assert not optimizer.state


def test_a_closure_is_called_with_gradients_on_and_returned() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamW([p], lr=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert bool((p < 1).all())


@pytest.mark.parametrize("overflow", [False, True])
def test_a_gradient_scaler_scales_and_skips(overflow: bool, device: torch.device) -> None:
    ours, theirs = parameters(device=device), parameters(device=device)
    steps = []
    for params, kind in ((ours, AdamW), (theirs, torch.optim.AdamW)):
        optimizer, scaler = kind(params, fused=True), torch.amp.GradScaler(device.type, init_scale=64.0)
        torch.manual_seed(3)
        for k in range(2):
            give(params, draw(params, 64.0))
            scaler.scale(torch.ones((), device=device))  # a scaler wants to have been used
            if overflow and k == 1:
                params[0].grad[17] = math.inf
            scaler.step(optimizer)
            scaler.update()
        steps.append([float(state["step"]) for state in optimizer.state.values()])
        assert scaler.get_scale() == (32.0 if overflow else 64.0)
    assert steps[0] == steps[1] == [1.0 if overflow else 2.0] * len(ours)
    assert_same(ours, theirs, 1e-6)  # float32 steps of 1e-3


TENSOR = torch.tensor(0.9)
INF, NAN, HUGE = math.inf, math.nan, 10**400

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"foreach": True}, ValueError, "foreach must be None or False, got True"),
    ({"foreach": "yes"}, TypeError, "foreach must be None or False, got 'yes'"),
    ({"differentiable": True}, ValueError, "differentiable must be False, got True"),
    ({"differentiable": torch.tensor(False)}, TypeError, r"differentiable must be False, got tensor\(False\)"),
    ({"fused": False}, ValueError, "fused must be None or True, got False"),
    ({"fused": 1}, TypeError, "fused must be None or True, got 1"),
    ({"betas": (TENSOR, TENSOR)}, TypeError, r"betas\[0\] must be a number, got tensor"),
    ({"betas": (0.9,)}, ValueError, r"betas must be two numbers, got \(0.9,\)"),
    ({"betas": (0.9, 0.99, 0.999)}, ValueError, "betas must be two numbers"),
    ({"betas": 0.9}, TypeError, "betas must be two numbers, got 0.9"),
    ({"betas": "ab"}, TypeError, "betas must be two numbers, got 'ab'"),
    ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be a number that is at least 0 and below 1, got 1.0"),
    ({"betas": (NAN, 0.9)}, ValueError, r"betas\[0\] must be .* got nan"),
    ({"lr": -1.0}, ValueError, "lr must be .*at least 0.* got -1.0"),
    ({"lr": True}, TypeError, "lr must be a number, got True"),
    ({"lr": INF}, ValueError, "lr must be .* got inf"),
    ({"lr": torch.tensor(True)}, TypeError, "lr must be a number or a floating tensor, got torch.bool"),
    ({"lr": torch.ones(2)}, ValueError, r"lr must have one element, got shape \(2,\)"),
    ({"eps": INF}, ValueError, "eps must be .* got inf"),
    ({"eps": False}, TypeError, "eps must be a number, got False"),
    ({"eps": TENSOR}, TypeError, "eps must be a number, got tensor"),
    ({"weight_decay": NAN}, ValueError, "weight_decay must be .* got nan"),
    ({"weight_decay": HUGE}, ValueError, "weight_decay must be .* got "),
    ({"weight_decay": True}, TypeError, "weight_decay must be a number, got True"),
    ({"amsgrad": "no"}, TypeError, "amsgrad must be True or False, got 'no'"),
    ({"maximize": torch.tensor(True)}, TypeError, r"maximize must be True or False, got tensor\(True\)"),
    ({"capturable": 0}, TypeError, "capturable must be True or False, got 0"),
    ({"params": None}, TypeError, "params must be tensors, .* got None"),
    ({"params": []}, ValueError, "params is empty"),
    ({"params": [3]}, TypeError, r"param_group\['params'\]\[0\] must be a tensor"),
    ({"params": [torch.ones(2, requires_grad=True) * 2]}, ValueError, r"param_group\['params'\] must be leaf tensors"),
    ({"params": [{"lr": 0.1}]}, ValueError, r"param_group must hold 'params', got \['lr'\]"),
    ({"params": [{"params": [nn.Parameter(torch.ones(2))], "lr": INF}]}, ValueError, "lr must be .* got inf"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AdamW(**{"params": [nn.Parameter(torch.ones(2))]} | arguments)


def test_a_group_may_be_empty() -> None:
    ours, theirs = parameters(), parameters()
    mine = AdamW([{"params": []}, {"params": iter(ours)}], lr=0.5)
    other = torch.optim.AdamW([{"params": []}, {"params": iter(theirs)}], lr=0.5, fused=True)
    grads = draw(ours)
    for params, optimizer in ((ours, mine), (theirs, other)):
        give(params, grads)
        optimizer.step()
    assert_same(ours, theirs, 1e-6)  # float32 steps of 0.5


def test_numbers_of_numpy_are_numbers() -> None:
    ours, theirs = parameters(), parameters()
    mine = AdamW(ours, lr=np.float32(0.5), betas=[np.float64(0.5), 0], eps=np.float32(0.25), weight_decay=0)
    other = torch.optim.AdamW(theirs, lr=0.5, betas=(0.5, 0.0), eps=0.25, weight_decay=0, fused=True)
    grads = draw(ours)
    for params, optimizer in ((ours, mine), (theirs, other)):
        give(params, grads)
        optimizer.step()
    assert_same(ours, theirs, 1e-6)  # float32 steps of 0.5


def test_a_sparse_gradient_raises_and_nothing_has_changed() -> None:
    p, table = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(5, 2))
    optimizer = AdamW([p, table])
    p.grad = torch.ones(2)
    table.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (5, 2))
    with pytest.raises(TypeError, match=r"shape \(5, 2\) is sparse"):
        optimizer.step()
    assert torch.equal(p, torch.ones(2))
    assert not optimizer.state


# Along a combination


class Tasks:
    """Three tasks on shared parameters, a head each, with gradients that are drawn anew each step."""

    def __init__(self, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> None:
        self.shared = parameters(dtype, device)
        self.heads = [nn.Parameter(torch.ones(7, dtype=dtype, device=device)) for _ in range(3)]
        self.params = [*self.shared, *self.heads]
        self.names = [(f"layer{k}.weight", p) for k, p in enumerate(self.params)]

    def losses(self, scale: float = 1.0) -> list[Tensor]:
        common = draw(self.shared)
        losses = []
        for t, head in enumerate(self.heads):
            grads = [(-1.0) ** t * c + d for c, d in zip(common, draw(self.shared), strict=True)]
            terms = [(p * g).sum() for p, g in zip(self.shared, grads, strict=True)]
            losses.append(scale * (sum(terms, torch.zeros((), device=head.device)) + (head * draw([head])[0]).sum()))
        return losses


def methods(device: torch.device = CPU) -> dict[str, dict[str, Any]]:
    order = [2, 0, 1]
    torch.manual_seed(7)  # for the networks of GradAttention

    def generator() -> torch.Generator:
        return torch.Generator(device).manual_seed(1)

    return {
        "pcgrad": {"aggregator": gk.PCGrad(order=order)},
        "gradvac in groups": {"aggregator": gk.GradVac(order=order), "groups": lambda name: name < "layer1"},
        "suppressed": {
            "aggregator": gk.PCGrad(order=order),
            "suppression": gk.Suppression(0.4, block=2, scope="all", seed=1),
        },
        "suppressed update": {"aggregator": gk.PCGrad(order=order), "suppression": gk.Suppression(0.4, seed=1)},
        "kappa": {"aggregator": gk.PCGrad(order=order), "conflict_lr": gk.ConflictLR()},
        "attention": {"aggregator": gk.GradAttention(subset=8, generator=generator())},
        "attention on its subset": {"aggregator": gk.GradAttention(subset=8, update="subset", generator=generator())},
        "memory": {"aggregator": gk.PCGrad(order=order), "memory": True},
        "sum": {"aggregator": gk.Sum()},
        "sum, suppressed": {"aggregator": gk.Sum([1.0, 2.0, 0.5]), "suppression": gk.Suppression(0.4, seed=1)},
    }


@pytest.mark.parametrize("max_norm", [None, 3.0, 1e6])
@pytest.mark.parametrize("name", methods())
def test_an_update_is_a_backward_pass_clipping_and_a_step(
    name: str, max_norm: float | None, device: torch.device, request: pytest.FixtureRequest
) -> None:
    if interpreted(request) and (max_norm != 3.0 or "attention" in name):
        pytest.skip("takes long in the interpreter, and there is no other kernel in it")
    ours, theirs = Tasks(device), Tasks(device)
    mine = gk.SurgeryOptimizer(AdamW(ours.names, lr=0.01), **methods(device)[name])
    other = gk.SurgeryOptimizer(torch.optim.AdamW(theirs.names, lr=0.01, fused=True), **methods(device)[name])
    for k in range(2 if interpreted(request) else 4):
        torch.manual_seed(k)
        info = mine.update(ours.losses(), max_norm=max_norm)
        torch.manual_seed(k)
        other.zero_grad()
        expected = other.backward(theirs.losses())
        if max_norm is not None:
            total = nn.utils.clip_grad_norm_(theirs.params, max_norm)
            # Its square is a sum of float32 numbers, some roundings of 6e-8 each, that cancel.
            terms = total.square()
            if expected.gramian is not None:
                w = info.weights.abs()
                terms = terms + (w.unsqueeze(-2) @ expected.gramian.abs() @ w.unsqueeze(-1)).sum()
            assert_near(info.total_norm, total, terms / total, 3e-6)
        other.step()
        assert all(p.grad is None for p in ours.params)
        assert_near(info.weights, expected.weights, expected.weights.abs().max(), 1e-5)
        assert (info.kept is None) == (expected.kept is None)
        assert info.kept is None or torch.equal(info.kept, expected.kept)
    for p, q in zip(ours.params, theirs.params, strict=True):
        a, b = mine.state[p]["exp_avg"], other.state[q]["exp_avg"]
        assert_near(a, b, b.abs().max() + 1e-3, 1e-3)  # as the parameters, which both have moved apart since
    # Four float32 steps of 0.01, in which a gradient near zero may turn either way by its rounding.
    assert_same(ours.params, theirs.params, 2e-4)


def test_the_norm_is_that_of_the_reference() -> None:
    tasks = Tasks(dtype=torch.float64)
    opt = gk.SurgeryOptimizer(AdamW(tasks.names), gk.PCGrad(order=[0, 1, 2]))
    losses = tasks.losses()
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, tasks.shared, retain_graph=True)]) for loss in losses
    ]
    heads = [
        torch.autograd.grad(loss, head, retain_graph=True)[0] for loss, head in zip(losses, tasks.heads, strict=True)
    ]
    update = torch.cat([sum(reference.pcgrad(rows, [[1, 2], [0, 2], [0, 1]])), *heads])
    norm = opt.update(losses, max_norm=1.0).total_norm
    assert norm is not None
    assert_near(norm, update.norm(), update.norm(), 1e-12)  # float64


def test_what_stands_in_grad_is_added(device: torch.device) -> None:
    ours, theirs = Tasks(device), Tasks(device)
    mine = gk.SurgeryOptimizer(AdamW(ours.names), gk.PCGrad(order=[0, 1, 2]))
    other = gk.SurgeryOptimizer(torch.optim.AdamW(theirs.names, fused=True), gk.PCGrad(order=[0, 1, 2]))
    torch.manual_seed(0)
    mine.backward(ours.losses())
    mine.update(ours.losses())
    torch.manual_seed(0)
    other.backward(theirs.losses())
    other.backward(theirs.losses())
    other.step()
    assert all(p.grad is None for p in ours.params)
    assert_same(ours.params, theirs.params, 1e-6)  # a float32 step of 1e-3


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("scope", [None, "update", "all"])
def test_a_scaler_in_an_update(
    scope: str | None, enabled: bool, device: torch.device, request: pytest.FixtureRequest
) -> None:
    """Scaled losses step as others do; one that overflows changes nothing, and the scaler backs off."""
    if interpreted(request) and not enabled:
        pytest.skip("takes long in the interpreter, and is no other kernel")

    def made(tasks: Tasks) -> gk.SurgeryOptimizer:
        suppression = None if scope is None else gk.Suppression(0.3, scope=scope, seed=1)
        return gk.SurgeryOptimizer(AdamW(tasks.names), gk.PCGrad(order=[0, 1, 2]), suppression=suppression)

    ours, theirs = Tasks(device), Tasks(device)
    mine, other = made(ours), made(theirs)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, enabled=enabled)
    for k in range(3):
        torch.manual_seed(k)
        info = mine.update([scaler.scale(loss) for loss in ours.losses()], max_norm=2.0, scaler=scaler)
        scaler.update()
        torch.manual_seed(k)
        expected = other.update(theirs.losses(), max_norm=2.0)
        assert_near(info.total_norm, expected.total_norm, expected.total_norm, 1e-5)
    assert_same(ours.params, theirs.params, 1e-5)  # three float32 steps of 1e-3
    if not enabled:
        return
    before = [p.detach().clone() for p in ours.params]
    mine.update([scaler.scale(loss) for loss in ours.losses(torch.inf)], scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(p, q) for p, q in zip(ours.params, before, strict=True))
    assert {float(state["step"]) for state in mine.state.values()} == {3.0}


def test_a_scaler_forgets_a_step_that_raised() -> None:
    tasks = Tasks()
    opt = gk.SurgeryOptimizer(AdamW(tasks.names), gk.PCGrad(order=[0, 1, 2]))

    def refuse(*_: Any) -> None:
        raise RuntimeError("not now")

    hook = opt.register_step_pre_hook(refuse)
    with pytest.raises(RuntimeError, match="not now"):
        opt.update(tasks.losses(1024.0), scaler=used(torch.amp.GradScaler("cpu", init_scale=1024.0)))
    hook.remove()
    torch.manual_seed(1)
    opt.update(tasks.losses(1024.0), scaler=used(torch.amp.GradScaler("cpu", init_scale=1024.0)))
    found = [opt.state[p]["exp_avg"] for p in tasks.params]
    twin = Tasks()
    other = gk.SurgeryOptimizer(AdamW(twin.names), gk.PCGrad(order=[0, 1, 2]))
    torch.manual_seed(1)
    other.update(twin.losses())
    for a, b in zip(found, (other.state[p]["exp_avg"] for p in twin.params), strict=True):
        assert_near(a, b, b.abs().max(), 1e-5)  # float32


def used(scaler: torch.amp.GradScaler) -> torch.amp.GradScaler:
    """A scaler wants to have scaled something before it steps."""
    scaler.scale(torch.ones(()))
    return scaler


class NotANumber(gk.Aggregator):
    def weights(self, M: Tensor) -> Tensor:
        return M.new_full(M.shape[:-1], math.nan)


def test_a_scaler_sees_weights_that_are_not_finite() -> None:
    tasks = Tasks()
    opt, scaler = gk.SurgeryOptimizer(AdamW(tasks.names), NotANumber()), torch.amp.GradScaler("cpu", init_scale=8.0)
    opt.update([scaler.scale(loss) for loss in tasks.losses()], scaler=scaler)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert_same(tasks.params, Tasks().params, 0.0)


def test_a_norm_that_is_not_finite_is_seen() -> None:
    tasks = Tasks()
    gk.SurgeryOptimizer(AdamW(tasks.names), gk.PCGrad()).update(tasks.losses(torch.inf), max_norm=1.0)
    assert all(bool(p.isnan().all()) for p in tasks.shared)


def test_two_optimizers_share_a_scaler() -> None:
    both = [Tasks(), Tasks()]
    optimizers = [gk.SurgeryOptimizer(AdamW(tasks.names), gk.PCGrad()) for tasks in both]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for k in range(2):
        for tasks, opt in zip(both, optimizers, strict=True):
            overflow = torch.inf if k == 1 and tasks is both[0] else 1.0
            opt.update([scaler.scale(loss) for loss in tasks.losses(overflow)], scaler=scaler)
        scaler.update()
    assert scaler.get_scale() == 4.0
    assert [{float(s["step"]) for s in opt.state.values()} for opt in optimizers] == [{1.0}, {2.0}]
    losses = [[scaler.scale(loss) for loss in both[0].losses()] for _ in range(2)]
    optimizers[0].update(losses[0], scaler=scaler)
    with pytest.raises(RuntimeError, match="already been called"):
        optimizers[0].update(losses[1], scaler=scaler)


def test_hooks_and_schedulers_see_a_step() -> None:
    tasks = Tasks()
    opt = gk.SurgeryOptimizer(AdamW(tasks.names, lr=0.5), gk.PCGrad())
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.1)
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *_: seen.append("wrapper"))
    opt.optimizer.register_step_post_hook(lambda *_: seen.append("inner"))
    opt.update(tasks.losses())
    schedule.step()
    assert seen == ["wrapper", "inner"]
    assert opt.param_groups[0]["lr"] == pytest.approx(0.05)


def test_around_another_optimizer_it_goes_by_grad() -> None:
    ours, theirs = Tasks(), Tasks()
    mine = gk.SurgeryOptimizer(torch.optim.SGD(ours.names, lr=0.1), gk.PCGrad(order=[0, 1, 2]))
    other = gk.SurgeryOptimizer(torch.optim.SGD(theirs.names, lr=0.1), gk.PCGrad(order=[0, 1, 2]))
    torch.manual_seed(0)
    mine.update(ours.losses(), max_norm=1.0)
    torch.manual_seed(0)
    other.backward(theirs.losses())
    nn.utils.clip_grad_norm_(theirs.params, 1.0)
    other.step()
    assert all(torch.equal(p, q) for p, q in zip(ours.params, theirs.params, strict=True))
    assert all(p.grad is None for p in ours.params)


def test_a_hook_on_grad_gets_it() -> None:
    tasks = Tasks()
    seen: list[Tensor] = []
    tasks.shared[0].register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    gk.SurgeryOptimizer(AdamW(tasks.names), gk.PCGrad()).update(tasks.losses())
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_norm": 0.0}, ValueError, "max_norm must be .* above 0.* got 0.0"),
        ({"max_norm": math.nan}, ValueError, "max_norm must be .* got nan"),
        ({"max_norm": 10**400}, ValueError, "max_norm must be .* got 1000"),
        ({"max_norm": "1"}, TypeError, "max_norm must be a number, got '1'"),
        ({"max_norm": True}, TypeError, "max_norm must be a number, got True"),
        ({"scaler": 2.0}, TypeError, "scaler must be a torch.amp.GradScaler or None, got 2.0"),
    ],
)
@pytest.mark.parametrize("inner", [AdamW, torch.optim.SGD])
def test_bad_arguments_of_an_update(
    inner: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    tasks = Tasks()
    opt = gk.SurgeryOptimizer(inner(tasks.names, lr=0.1), gk.PCGrad())
    before = [p.detach().clone() for p in tasks.params]
    with pytest.raises(error, match=message):
        opt.update(tasks.losses(), **arguments)
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(tasks.params, before, strict=True))


def test_an_infinite_max_norm_measures_and_cuts_nothing() -> None:
    ours, theirs = Tasks(), Tasks()
    infos = []
    for tasks, max_norm in ((ours, math.inf), (theirs, 1e30)):
        torch.manual_seed(0)
        opt = gk.SurgeryOptimizer(AdamW(tasks.names), gk.PCGrad(order=[0, 1, 2]))
        infos.append(opt.update(tasks.losses(), max_norm=max_norm).total_norm)
    assert torch.equal(*infos)
    assert_same(ours.params, theirs.params, 0.0)


def test_a_step_without_any_gradient_does_nothing() -> None:
    p = nn.Parameter(torch.ones(3))
    opt = AdamW([p])
    opt.step()
    assert opt.step(lambda: 7.0) == 7.0
    assert torch.equal(p, torch.ones(3))
    assert not opt.state


def test_a_combination_of_sixteen_bits_is_not_rounded_before_the_step() -> None:
    """Both gradients are within float16, their sum is not."""
    p = nn.Parameter(torch.ones(3, dtype=torch.float16))
    opt = gk.SurgeryOptimizer(AdamW([p], lr=1e-2, weight_decay=0.0), gk.PCGrad(order=[0, 1]))
    c = torch.tensor([4e4, 3e4, 2e4])
    opt.update([(p.float() * c).sum(), (p.float() * c).sum()])
    expected = 0.1 * 2 * c.half().float()  # (1 - beta1) of the sum
    assert_near(opt.state[p]["exp_avg"], expected, expected, 3 * 2**-24)  # the product, the sum and the store
    assert p.isfinite().all()

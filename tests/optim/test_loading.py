"""States that do not fit: an error that names what is wrong, and nothing loaded."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gradkern as gk
from gradkern.compat.amp import GradVacAMP, PCGradAMP
from gradkern.compat.pcgrad import PCGrad
from tests.models import MultiHead, problem


def trained(model: MultiHead, x: Tensor, y: Tensor, opt: Any) -> Any:
    """Return the optimizer after two steps."""
    for _ in range(2):
        opt.zero_grad()
        losses = model.losses(x, y)
        if isinstance(opt, gk.SurgeryOptimizer | PCGradAMP | GradVacAMP):
            opt.backward(losses)
        else:
            gk.backward(losses, model, aggregator=gk.PCGrad())
        opt.step()
    return opt


def surgery(inner: Callable[..., torch.optim.Optimizer]) -> Callable[[MultiHead], gk.SurgeryOptimizer]:
    def make(model: MultiHead) -> gk.SurgeryOptimizer:
        method = gk.GradVac(generator=torch.Generator().manual_seed(1))
        suppression = gk.Suppression(0.3, seed=1)
        return gk.SurgeryOptimizer(inner(model.parameters(), lr=0.01), method, suppression=suppression, memory=True)

    return make


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=64.0)


LOADERS: dict[str, Callable[[MultiHead], Any]] = {
    "SurgeryOptimizer of SGD": surgery(torch.optim.SGD),
    "SurgeryOptimizer of Adam": surgery(torch.optim.Adam),
    "SurgeryOptimizer of AdamW": surgery(gk.optim.AdamW),
    "AdamW": lambda model: gk.optim.AdamW(model.parameters(), lr=0.01),
    "compat.pcgrad": lambda model: PCGrad(torch.optim.Adam(model.parameters(), lr=0.01)),
    "PCGradAMP": lambda model: PCGradAMP(3, torch.optim.Adam(model.parameters(), lr=0.01), scaler()),
    "GradVacAMP": lambda model: GradVacAMP(3, torch.optim.Adam(model.parameters(), lr=0.01), "cpu", scaler()),
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def refuses(name: str, change: Callable[[Any], Any], message: str = "state_dict") -> None:
    """Assert that a changed state is refused, and nothing of it loaded."""
    model, x, y = problem()
    other, _, _ = problem()
    opt = trained(model, x, y, LOADERS[name](model))
    state = copy.deepcopy(trained(other, 2 * x, y, LOADERS[name](other)).state_dict())
    before = copy.deepcopy(opt.state_dict())
    assert not same(before, state)
    with pytest.raises((TypeError, ValueError), match=message):
        opt.load_state_dict(change(state))
    assert same(opt.state_dict(), before)
    trained(model, x, y, opt)


@pytest.mark.parametrize(
    "value", [None, 3, 0.5, True, "state", b"x", [], [1], {}, {"x": 1}, {3: 4}, torch.ones(2), len]
)
@pytest.mark.parametrize("name", LOADERS)
def test_what_is_no_state_is_refused(name: str, value: Any) -> None:
    refuses(name, lambda state: value)


@pytest.mark.parametrize("name", LOADERS)
def test_a_state_that_fits_loads(name: str) -> None:
    """Otherwise the refusals would prove nothing."""
    (model, x, y), (other, _, _) = problem(), problem()
    state = copy.deepcopy(trained(other, 2 * x, y, LOADERS[name](other)).state_dict())
    opt = LOADERS[name](model)
    opt.load_state_dict(state)
    assert same(opt.state_dict(), state)


def changed(*path: Any, to: Any) -> Callable[[Any], Any]:
    """Return a function that changes an entry of a state; ``to`` may be a function of the entry."""

    def change(state: Any) -> Any:
        *way, last = path
        holder = state
        for key in way:
            holder = holder[key]
        holder[last] = to(holder[last]) if callable(to) else to
        return state

    return change


def without(*path: Any) -> Callable[[Any], Any]:
    def change(state: Any) -> Any:
        *way, last = path
        holder = state
        for key in way:
            holder = holder[key]
        del holder[last]
        return state

    return change


SURGERY = [name for name in LOADERS if name.startswith("SurgeryOptimizer")]
OF_SURGERY: list[tuple[Callable[[Any], Any], str]] = [
    (without("state"), "state_dict must hold 'state' and 'param_groups'"),
    (changed("param_groups", to=3), r"state_dict\['param_groups'\] must be a list"),
    (changed("param_groups", to=[{}]), r"state_dict\['param_groups'\]\[0\] must hold a list 'params'"),
    (changed("param_groups", 0, "params", to=lambda params: params[:-1]), "parameter group"),
    (changed("state", to=None), r"state_dict\['state'\] must be a dictionary, got None"),
    (changed("surgery", to=3), r"state_dict\['surgery'\] must hold 'method' and 'state', got 3"),
    (changed("surgery", "method", to="PCGrad"), "state_dict is of a step with PCGrad"),
    (changed("surgery", "state", to=None), "dict"),
    (changed("surgery", "suppression", "step", to=-1), "step must be"),
    (changed("surgery", "memory", to=3), "the memory to load must be lists"),
    (changed("surgery", "memory", 1, 2, to=lambda g: g[:1]), "the memory of task 1 for parameter 2"),
    (changed("surgery", "memory", 1, 2, to=lambda g: g.long()), "the memory of task 1 for parameter 2 .* torch.int64"),
    (changed("surgery", "memory", 1, 2, to=lambda g: g + 0j), "the memory of task 1 for parameter 2 .* torch.complex"),
    (changed("surgery", "state", "targets", to=torch.zeros(2, 3)), "targets"),
]


@pytest.mark.parametrize(("change", "message"), OF_SURGERY)
@pytest.mark.parametrize("name", SURGERY)
def test_a_damaged_state_of_a_surgery(name: str, change: Callable[[Any], Any], message: str) -> None:
    refuses(name, change, message)


OF_ADAMW: list[tuple[Callable[[Any], Any], str]] = [
    (changed("param_groups", 0, "lr", to="fast"), "lr must be a number, got 'fast'"),
    (changed("param_groups", 0, "betas", to=(0.9,)), "betas must be two numbers"),
    (without("param_groups", 0, "eps"), r"state_dict\['param_groups'\]\[0\] must hold \['eps'\]"),
    (changed("state", 3, to=7), r"state_dict\['state'\]\[3\] must be a dictionary, got 7"),
    (without("state", 3, "step"), r"state_dict\['state'\]\[3\] must hold 'step'"),
    (changed("state", 3, "step", to=torch.ones(2)), r"a step of shape \(2,\)"),
    (changed("state", 3, "step", to="x"), "step in state_dict must be a number, got 'x'"),
    (changed("state", 3, "exp_avg", to=torch.ones(7)), r"exp_avg of shape \(7,\)"),
    (changed("state", 3, "exp_avg", to=lambda m: m + 0j), "exp_avg of torch.complex64, which must be floating"),
]


@pytest.mark.parametrize(("change", "message"), OF_ADAMW)
@pytest.mark.parametrize("name", ["AdamW", "SurgeryOptimizer of AdamW"])
def test_a_damaged_state_of_adamw(name: str, change: Callable[[Any], Any], message: str) -> None:
    refuses(name, change, message)


def test_what_torchs_optimizer_has_half_loaded_is_put_back() -> None:
    """Adam replaces its groups and state before it looks at the steps."""
    model, x, y = problem()
    opt = trained(model, x, y, LOADERS["SurgeryOptimizer of Adam"](model))
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0]["lr"] = 7.0
    state["state"][3]["step"] = "x"
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="could not convert"):
        opt.load_state_dict(state)
    assert same(opt.state_dict(), before)


AMP = ["PCGradAMP", "GradVacAMP"]
OF_AMP: list[tuple[Callable[[Any], Any], str]] = [
    (without("scaler"), "state_dict must hold 'scaler'"),
    (changed("optimizer", to=None), "state_dict must be a dictionary, got None"),
    (changed("optimizer", to={}), "state_dict must hold 'state' and 'param_groups'"),
    (changed("optimizer", "param_groups", 0, "params", to=[0]), "parameter group"),
    (changed("scaler", to=None), r"state_dict\['scaler'\] must be a dictionary, got None"),
    (changed("scaler", to={}), r"state_dict\['scaler'\] must hold 'scale'"),
    *(
        (without("scaler", name), rf"state_dict\['scaler'\] must hold '{name}'")
        for name in ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
    ),
    (changed("scaler", "scale", to="x"), r"scale in state_dict\['scaler'\] must be a number, got 'x'"),
    (changed("scaler", "growth_factor", to=None), r"growth_factor in state_dict\['scaler'\] must be a number"),
]


@pytest.mark.parametrize(("change", "message"), OF_AMP)
@pytest.mark.parametrize("name", AMP)
def test_a_damaged_state_with_a_scaler(name: str, change: Callable[[Any], Any], message: str) -> None:
    def with_another_scale(state: Any) -> Any:
        state["scaler"]["scale"] = 8.0
        return change(state)

    refuses(name, with_another_scale, message)


@pytest.mark.parametrize(
    ("rho", "message"),
    [
        (None, "rho_T in state_dict must be a tensor, got None"),
        (torch.zeros(2, 2), r"rho_T in state_dict must be of shape \(3, 3\), got \(2, 2\)"),
        (torch.zeros(3, 3) + 0j, "rho_T in state_dict must be floating, got torch.complex64"),
        (torch.zeros(3, 3).long(), "rho_T in state_dict must be floating, got torch.int64"),
    ],
)
def test_damaged_targets(rho: Any, message: str) -> None:
    refuses("GradVacAMP", changed("rho_T", to=rho), message)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SurgeryOptimizer of SGD", {}),
        ("SurgeryOptimizer of Adam", {}),
        ("SurgeryOptimizer of AdamW", {}),
        ("SurgeryOptimizer of Adam", {"full_state_dict": True, "cpu_offload": True}),
        ("SurgeryOptimizer of AdamW", {"full_state_dict": True, "cpu_offload": True}),
    ],
)
def test_the_states_of_torch_distributed_checkpoint_have_the_surgery(name: str, options: dict[str, bool]) -> None:
    """They are of the names of parameters, and have nothing but states of parameters and groups."""
    from torch.distributed.checkpoint import state_dict as by_name

    settings = by_name.StateDictOptions(**options)
    model, x, y = problem()
    opt = trained(model, x, y, LOADERS[name](model))
    saved = copy.deepcopy(by_name.get_optimizer_state_dict(model, opt, options=settings))
    assert set(saved) == {"state", "param_groups"}
    other = copy.deepcopy(model)
    new = LOADERS[name](other)
    by_name.set_optimizer_state_dict(other, new, saved, options=settings)
    assert same(new.state_dict(), opt.state_dict())
    assert "surgery" not in new.param_groups[0]
    for m, o in ((model, opt), (other, new)):
        trained(m, x, y, o)
    assert same(other.state_dict(), model.state_dict())


def test_an_ordinary_optimizer_loads_a_state_with_a_surgery() -> None:
    model, x, y = problem()
    opt = trained(model, x, y, LOADERS["SurgeryOptimizer of Adam"](model))
    plain = torch.optim.Adam(model.parameters())
    plain.load_state_dict(opt.state_dict())
    assert plain.param_groups[0]["lr"] == 0.01
    assert same(plain.state_dict()["state"], opt.state_dict()["state"])
    again = LOADERS["SurgeryOptimizer of Adam"](model)
    again.load_state_dict(torch.optim.Adam(model.parameters(), lr=0.5).state_dict())
    assert again.param_groups[0]["lr"] == 0.5

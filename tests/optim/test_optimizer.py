"""SurgeryOptimizer around every torch optimizer, with schedulers, scalers, hooks, closures and checkpoints."""

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gradkern as gk
from tests.models import MultiHead, problem

ORDER = [[0, 1, 2], [2, 0, 1], [1, 2, 0]]


def optimizers() -> list[type[Optimizer]]:
    found = [c for c in vars(torch.optim).values() if isinstance(c, type) and issubclass(c, Optimizer)]
    return [c for c in found if c is not Optimizer]


def build(kind: type[Optimizer], model: nn.Module, **options: Any) -> Optimizer:
    """An optimizer of ``kind`` over the parameters it takes: Muon is for matrices, SparseAdam for sparse gradients."""
    params = [(n, p) for n, p in model.named_parameters() if kind.__name__ != "Muon" or p.ndim == 2]
    return kind(params, lr=0.01, **options)


def wrap(model: nn.Module, method: gk.Aggregator | None = None, **options: Any) -> gk.SurgeryOptimizer:
    inner = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    return gk.SurgeryOptimizer(inner, method or gk.PCGrad(order=ORDER), **options)


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_the_list_of_optimizers_is_torchs() -> None:
    assert {"SGD", "Adam", "AdamW", "LBFGS", "RMSprop", "Muon", "SparseAdam"} <= {c.__name__ for c in optimizers()}


@pytest.mark.parametrize("kind", [k for k in optimizers() if k.__name__ != "SparseAdam"], ids=lambda k: k.__name__)
def test_every_torch_optimizer_steps_as_after_gk_backward(kind: type[Optimizer]) -> None:
    results = []
    for wrapped in (False, True):
        model, x, y = problem()
        inner = build(kind, model)
        params = [p for group in inner.param_groups for p in group["params"]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Muon leaves the biases out
            opt = gk.SurgeryOptimizer(inner, gk.PCGrad(order=ORDER)) if wrapped else inner
            for _ in range(3):

                def closure() -> Tensor:
                    opt.zero_grad()  # noqa: B023
                    losses = model.losses(x, y)  # noqa: B023
                    if wrapped:  # noqa: B023
                        opt.backward(losses)  # noqa: B023
                    else:
                        gk.backward(losses, params, aggregator=gk.PCGrad(order=ORDER))  # noqa: B023
                    return sum(losses)

                if kind.__name__ == "LBFGS":
                    opt.step(closure)
                else:
                    closure()
                    opt.step()
        results.append(values(model))
    assert same(*results)
    assert not same(results[0], values(problem()[0]))


def test_sparse_adam() -> None:
    results = []
    for wrapped in (False, True):
        torch.manual_seed(0)
        embedding = nn.Embedding(10, 3, sparse=True)
        inner = torch.optim.SparseAdam(embedding.parameters(), lr=0.1)
        out = embedding(torch.tensor([1, 2, 1]))
        losses = [out.sum(), -out.square().sum()]
        if wrapped:
            opt = gk.SurgeryOptimizer(inner, gk.PCGrad(order=[0, 1]))
            opt.backward(losses)
            opt.step()
        else:
            gk.backward(losses, embedding, aggregator=gk.PCGrad(order=[0, 1]))
            inner.step()
        results.append(values(embedding))
    assert same(*results)


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"amsgrad": True}])
def test_adamw_in_each_implementation(options: dict[str, bool]) -> None:
    results = []
    for wrapped in (False, True):
        model, x, y = problem()
        inner = torch.optim.AdamW(model.parameters(), lr=0.01, **options)
        opt = gk.SurgeryOptimizer(inner, gk.PCGrad(order=ORDER)) if wrapped else inner
        for _ in range(3):
            opt.zero_grad()
            if wrapped:
                opt.backward(model.losses(x, y))
            else:
                gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(order=ORDER))
            opt.step()
        results.append(values(model))
    assert same(*results)


def test_it_is_an_optimizer_over_the_wrapped_ones_state() -> None:
    model, x, y = problem()
    opt = wrap(model)
    inner = opt.optimizer
    assert isinstance(opt, Optimizer)
    assert opt.param_groups is inner.param_groups
    assert opt.state is inner.state
    assert opt.defaults is inner.defaults
    assert inner.param_groups[0]["lr"] == 0.01  # torch's __init__ has not emptied it
    opt.backward(model.losses(x, y))
    opt.step()
    assert len(opt.state) == 10
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    opt.backward(model.losses(x, y))
    opt.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())


s = torch.optim.lr_scheduler
SCHEDULERS = {
    "StepLR": lambda opt: s.StepLR(opt, 1, 0.5),
    "LambdaLR": lambda opt: s.LambdaLR(opt, lambda e: 0.9**e),
    "CosineAnnealingLR": lambda opt: s.CosineAnnealingLR(opt, 10),
    "OneCycleLR": lambda opt: s.OneCycleLR(opt, 0.1, total_steps=20),
    "SequentialLR": lambda opt: s.SequentialLR(opt, [s.ConstantLR(opt), s.ExponentialLR(opt, 0.9)], [2]),
    "CyclicLR": lambda opt: s.CyclicLR(opt, 0.01, 0.1, cycle_momentum=False),
    "ReduceLROnPlateau": lambda opt: s.ReduceLROnPlateau(opt, patience=0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str) -> None:
    rates = []
    for wrapped in (False, True):
        model, x, y = problem()
        inner = torch.optim.AdamW(model.parameters(), lr=0.01)
        opt = gk.SurgeryOptimizer(inner, gk.PCGrad(order=ORDER)) if wrapped else inner
        with warnings.catch_warnings():
            if name != "SequentialLR":  # its own use of its parts warns with a plain optimizer too
                warnings.simplefilter("error")  # torch warns when it thinks that no step was taken
            scheduler = SCHEDULERS[name](opt)
            seen = []
            for _ in range(5):
                gk.backward(model.losses(x, y), model, aggregator=gk.PCGrad(order=ORDER))
                opt.step()
                scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
                seen.append(inner.param_groups[0]["lr"])
        rates.append(seen)
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1


@pytest.mark.parametrize("method", [gk.PCGrad(order=ORDER), gk.Sum()])
def test_grad_scaler(method: gk.Aggregator) -> None:
    """Scaled losses, unscaled by the scaler before the step, give the step without a scaler; an overflow gives none."""
    expected, x, y = problem()
    plain = wrap(expected, method)
    plain.backward(expected.losses(x, y))
    plain.step()

    model, x, y = problem()
    opt = wrap(model, method)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    opt.backward([scaler.scale(loss) for loss in model.losses(x, y)])
    scaler.step(opt)
    scaler.update()
    assert same(values(model), values(expected))  # a power of two rounds nothing

    before = values(model)
    opt.zero_grad()
    losses = model.losses(x, y)
    losses[1] = losses[1] * float("inf")
    opt.backward([scaler.scale(loss) for loss in losses])
    scaler.step(opt)
    scaler.update()
    assert same(values(model), before)
    assert scaler.get_scale() == 2.0**11


def test_grad_scaler_with_a_fused_optimizer_unscales_before_the_step() -> None:
    """A fused AdamW claims to take the scale itself; the wrapper must not pass that claim on."""
    stepped = []
    for scale in (1.0, 2.0**16):
        model, x, y = problem()
        opt = gk.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, fused=True), gk.PCGrad(order=ORDER))
        assert opt.optimizer._step_supports_amp_scaling
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        opt.backward([scaler.scale(loss) for loss in model.losses(x, y)])
        scaler.step(opt)
        stepped.append(values(model))
    assert same(*stepped)


def test_checkpoint_resumes_exactly() -> None:
    model, x, y = problem()

    def method() -> gk.PCGrad:
        return gk.PCGrad(generator=torch.Generator().manual_seed(11))

    opt = wrap(model, method())
    for _ in range(3):
        opt.zero_grad()
        opt.backward(model.losses(x, y))
        opt.step()
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)

    def three_more(model: MultiHead, opt: gk.SurgeryOptimizer) -> list[Tensor]:
        for _ in range(3):
            opt.zero_grad()
            opt.backward(model.losses(x, y))
            opt.step()
        return values(model)

    fresh, _, _ = problem()
    fresh.load_state_dict(loaded["model"])
    fresh_opt = wrap(fresh, gk.PCGrad(generator=torch.Generator()))
    fresh_opt.load_state_dict(loaded["opt"])
    assert same(three_more(model, opt), three_more(fresh, fresh_opt))


def test_checkpoints_of_plain_optimizers_load_and_the_other_way_round() -> None:
    model, x, y = problem()
    plain = torch.optim.AdamW(model.named_parameters(), lr=0.02)
    sum(model.losses(x, y)).backward()
    plain.step()
    opt = wrap(model)
    opt.load_state_dict(plain.state_dict())
    assert opt.param_groups[0]["lr"] == 0.02
    assert torch.equal(next(iter(opt.state.values()))["exp_avg"], next(iter(plain.state.values()))["exp_avg"])
    opt.step()
    assert set(opt.state_dict()) == {"state", "param_groups", "surgery"}
    plain.load_state_dict(opt.state_dict())
    assert next(iter(plain.state.values()))["step"] == 2


def test_a_checkpoint_of_another_method_loads_nothing() -> None:
    model, _, _ = problem()
    other = wrap(model, gk.Sum())
    other.param_groups[0]["lr"] = 0.5
    opt = wrap(model)
    with pytest.raises(ValueError, match="state_dict is of a step with Sum, this optimizer's method is PCGrad"):
        opt.load_state_dict(other.state_dict())
    assert opt.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize(
    ("surgery", "message"),
    [
        ({}, "must hold 'method' and 'state'"),
        ({"method": "PCGrad", "state": {"_extra_state": torch.Generator().get_state()}}, "generator is None"),
        ({"method": "PCGrad", "state": {}, "suppression": {"seed": 1, "step": 2}}, "steps with suppression"),
        ({"method": "PCGrad", "state": {}, "memory": [[None] * 10] * 3}, "steps with memory"),
    ],
)
def test_a_checkpoint_that_does_not_fit_loads_nothing(surgery: dict[str, Any], message: str) -> None:
    model, x, y = problem()
    saved = wrap(model)
    saved.backward(model.losses(x, y))
    saved.step()
    saved.param_groups[0]["lr"] = 0.5
    opt = wrap(model)
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved.state_dict() | {"surgery": surgery})
    assert opt.param_groups[0]["lr"] == 0.01
    assert not opt.state


def test_a_checkpoint_that_the_wrapped_optimizer_refuses_leaves_the_method_alone() -> None:
    model, _, _ = problem()
    generator = torch.Generator().manual_seed(1)
    opt = wrap(model, gk.PCGrad(generator=generator))
    other = wrap(nn.Linear(2, 2), gk.PCGrad(generator=torch.Generator().manual_seed(2)))
    before = generator.get_state()
    with pytest.raises(ValueError, match="parameter group"):
        opt.load_state_dict(other.state_dict())
    assert torch.equal(generator.get_state(), before)


def test_state_dict_hooks_run() -> None:
    model, _, _ = problem()
    opt = wrap(model)
    calls = []
    opt.register_state_dict_pre_hook(lambda o: calls.append("pre"))
    opt.register_state_dict_post_hook(lambda o, state: state | {"note": len(calls)})
    opt.register_load_state_dict_pre_hook(lambda o, state: {k: v for k, v in state.items() if k != "note"})
    opt.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    state = opt.state_dict()
    assert state["note"] == 1
    assert "surgery" in state
    opt.load_state_dict(state)
    assert calls == ["pre", "loaded"]


def test_step_hooks_of_both_run_once_per_step() -> None:
    model, x, y = problem()
    opt = wrap(model)
    calls = []
    opt.register_step_pre_hook(lambda o, args, kwargs: calls.append(("pre", o)))
    opt.register_step_post_hook(lambda o, args, kwargs: calls.append(("post", o)))
    opt.optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append(("inner", o)))
    opt.backward(model.losses(x, y))
    opt.step()
    assert calls == [("pre", opt), ("inner", opt.optimizer), ("post", opt)]


def test_step_passes_the_closure_through() -> None:
    model, x, y = problem()
    opt = wrap(model)

    def closure() -> Tensor:
        opt.zero_grad()
        return opt.backward(model.losses(x, y)).losses.sum()

    before = values(model)
    assert torch.equal(opt.step(closure), sum(problem()[0].losses(x, y)))
    assert not same(values(model), before)


def test_add_param_group() -> None:
    model, x, y = problem()
    inner = torch.optim.SGD(model.trunk[2].named_parameters(prefix="trunk.2"), lr=0.1)
    opt = gk.SurgeryOptimizer(inner, gk.PCGrad(order=ORDER), groups="parameter")
    opt.add_param_group({"params": list(model.heads.named_parameters(prefix="heads")), "lr": 0.2})
    assert len(opt.param_groups) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # trunk.0 is outside, on purpose
        info = opt.backward(model.losses(x, y))
    assert info.gramian.shape == (8, 3, 3)
    opt.step()
    assert all(p.grad is None for p in model.trunk[0].parameters())
    assert all(p.grad is not None for p in model.heads.parameters())


def test_groups_by_module_over_named_param_groups() -> None:
    model, x, y = problem()
    inner = torch.optim.SGD(
        [{"params": list(m.named_parameters(prefix=n))} for n, m in (("trunk", model.trunk), ("heads", model.heads))],
        lr=0.1,
    )
    info = gk.SurgeryOptimizer(inner, gk.PCGrad(order=ORDER), groups="module").backward(model.losses(x, y))
    assert info.gramian.shape == (5, 3, 3)
    with pytest.raises(ValueError, match="groups='module' needs names"):
        gk.SurgeryOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), gk.PCGrad(), groups="module")


@pytest.mark.parametrize("part", [None, "module", "tensors"])
def test_pickle_and_deepcopy(part: str | None) -> None:
    model, x, y = problem()
    shared = {None: None, "module": model.trunk[2], "tensors": list(model.trunk[2].parameters())}[part]
    opt = wrap(model, groups="module", shared=shared)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1)  # which puts a step of its own on the instance
    opt.backward(model.losses(x, y))
    opt.step()
    scheduler.step()
    copied_model, copied = copy.deepcopy((model, opt))
    loaded_model, loaded = pickle.loads(pickle.dumps((model, opt)))
    for m, o in ((model, opt), (copied_model, copied), (loaded_model, loaded)):
        o.zero_grad()
        o.backward(m.losses(x, y))
        o.step()
    assert same(values(copied_model), values(model))
    assert same(values(loaded_model), values(model))
    assert repr(opt).startswith("SurgeryOptimizer(AdamW")
    way = {"through": "activations", "finish": "kept", "gramian": gk.Sketch(8, seed=1)}
    shown = repr(gk.SurgeryOptimizer(opt.optimizer, gk.PCGrad(), **way))
    assert shown.endswith(", through='activations', finish='kept', gramian=Sketch(columns=8, seed=1))")


def test_bad_arguments() -> None:
    model, _, _ = problem()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got list"):
        gk.SurgeryOptimizer(list(model.parameters()), gk.PCGrad())
    with pytest.raises(TypeError, match=r"aggregator must be a gradkern.Aggregator, got 'pcgrad'"):
        gk.SurgeryOptimizer(inner, "pcgrad")
    with pytest.raises(ValueError, match="groups must be 'model'"):
        gk.SurgeryOptimizer(inner, gk.PCGrad(), groups="layers")
    with pytest.raises(TypeError, match=r"shared must be a Module.*got Parameter"):
        gk.SurgeryOptimizer(inner, gk.PCGrad(), shared=model.trunk[0].weight)
    with pytest.raises(ValueError, match=r"shared must be some of params; shared\[0\]"):
        gk.SurgeryOptimizer(inner, gk.PCGrad(), shared=[nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match=r"losses must be a sequence.*got tensor"):
        gk.SurgeryOptimizer(inner, gk.PCGrad()).backward(torch.ones(()))

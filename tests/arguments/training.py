"""Calls of steps, optimizers, samplers and of the interfaces of other libraries."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import gradkern as gk
from gradkern.compat import amp, pcgrad
from gradkern.sampling import TaskSampler
from tests.arguments import values
from tests.arguments.call import Call, Prepared, Wrong, copied
from tests.arguments.values import Values
from tests.models import problem


def _losses() -> Values:
    """Return what are no losses of three tasks."""
    w = torch.ones(2, requires_grad=True)
    freed = w.square().sum()
    freed.backward()
    w.grad = None
    right = (w * 2).sum()
    return [
        None,
        3,
        0.5,
        "losses",
        b"losses",
        right,
        [],
        {},
        {0: right},
        {right},
        frozenset([right]),
        [None, None],
        [right, 0.5],
        [right, "loss"],
        [w * 2],
        [torch.ones(())],
        [torch.ones((), dtype=torch.int64)],
        [w.sum() + 0j],
        [(w * 2).sum().to("meta")],
        [freed],
        [lambda: 3],
        [lambda: None],
        [lambda: w * 2],
        [lambda: freed],
        [w.to_sparse().sum().unsqueeze(0).to_sparse()],
    ]


class _Training:
    """A model, its losses, and what a step may change."""

    def __init__(self) -> None:
        self.model, self.x, self.y = problem()
        self.params = list(self.model.parameters())
        self.h = self.model.trunk(self.x)
        heads = zip(self.model.heads, self.y, strict=True)
        self.losses = [(head(self.h).squeeze(-1) - y).square().mean() for head, y in heads]
        self.method = gk.GradVac()

    def state(self) -> Any:
        """Return copies of everything that a step may change."""
        return copied(
            [
                *self.params,
                *(p.grad for p in self.params),
                self.method.state_dict(),
                torch.get_rng_state(),
            ]
        )


def _step_arguments() -> Wrong:
    return {
        "losses": _losses,
        "features": lambda: [3, "h", True, [], [None], [3], {}],
        "batched": values.flags,
        "retain_graph": values.flags,
        "second": lambda: [[], 3, torch.ones(3)],
    }


def _advised_arguments() -> Wrong:
    return {name: wrong for name, wrong in _step_arguments().items() if name in ("losses", "features")}


def _step_options() -> Wrong:
    return {
        "aggregator": partial(values.of_class, gk.Aggregator, False),
        "groups": values.groupings,
        "shared": lambda: [x for x in values.modules_or_tensors() if x is not None],
        "suppression": partial(values.of_class, gk.Suppression, True),
        "process_group": values.process_groups,
    }


def _ways() -> Wrong:
    """Return values that are wrong for a step through rows, of which some are right for another way."""
    return {
        "through": values.strings,
        "finish": lambda: [*values.strings(), "kept"],
        "gramian": lambda: [*values.of_class(gk.Sketch, True), gk.Sketch(seed=0)],
        "per_example": lambda: [*values.flags(), True],
    }


def steps() -> Iterator[Call]:
    def prepare(step: Callable[..., Any]) -> Prepared:
        t = _Training()
        right = {"losses": t.losses, "params": t.model, "aggregator": t.method, "features": t.h}
        return Prepared(step, right, t.state)

    params: Wrong = {"params": values.modules_or_tensors}
    yield Call("backward", partial(prepare, gk.backward), _step_arguments() | _step_options() | _ways() | params)
    of_advice = _advised_arguments() | _step_options() | params
    yield Call("advise", partial(prepare, gk.advise), {k: v for k, v in of_advice.items() if k != "process_group"})


def optimizers() -> Iterator[Call]:
    for name, make in {"AdamW": gk.optim.AdamW, "SGD": torch.optim.SGD}.items():

        def prepare(method: str, make: Any = make) -> Prepared:
            t = _Training()
            inner = make(t.model.named_parameters(), lr=0.1)
            opt = gk.SurgeryOptimizer(inner, t.method)
            right: dict[str, Any] = {
                "backward": {"losses": t.losses, "features": t.h},
                "update": {"losses": t.losses, "features": t.h},
                "advise": {"losses": t.losses, "features": t.h},
                "load_state_dict": {"state_dict": opt.state_dict()},
                "add_param_group": {"param_group": {"params": [("new", nn.Parameter(torch.ones(2)))]}},
                "step": {},
            }
            return Prepared(getattr(opt, method), right[method], lambda: [t.state(), copied(opt.state_dict())])

        yield Call("SurgeryOptimizer.backward", partial(prepare, "backward"), _step_arguments(), name)
        yield Call("SurgeryOptimizer.advise", partial(prepare, "advise"), _advised_arguments(), name)
        of_update = {"max_norm": _max_norms, "scaler": partial(values.of_class, torch.amp.GradScaler, True)}
        yield Call("SurgeryOptimizer.update", partial(prepare, "update"), _step_arguments() | of_update, name)
        states, groups = {"state_dict": values.loaded_states}, {"param_group": _param_groups}
        yield Call("SurgeryOptimizer.load_state_dict", partial(prepare, "load_state_dict"), states, name)
        yield Call("SurgeryOptimizer.add_param_group", partial(prepare, "add_param_group"), groups, name)
        yield Call("SurgeryOptimizer.step", partial(prepare, "step"), {"closure": lambda: [3, "x", []]}, name)

    def made() -> Prepared:
        t = _Training()
        inner = torch.optim.SGD(t.model.named_parameters(), lr=0.1)
        return Prepared(gk.SurgeryOptimizer, {"optimizer": inner, "aggregator": t.method}, t.state)

    yield Call(
        "SurgeryOptimizer",
        made,
        _step_options()
        | _ways()
        | {
            "optimizer": partial(values.of_class, torch.optim.Optimizer, False),
            "conflict_lr": partial(values.of_class, gk.ConflictLR, True),
            "memory": values.flags,
            "shard_optimizer": values.flags,
        },
    )
    yield from _adamw()


def _max_norms() -> Values:
    """Return what is neither a limit of a norm nor None; an infinite one is no limit."""
    return [x for x in values.positive_numbers()[1:] if not (isinstance(x, float) and x == float("inf"))]


def _param_groups() -> Values:
    p = nn.Parameter(torch.ones(2))
    groups = [{"params": [x]} for x in (3, "p", None, p + 1)]
    return [None, 3, "x", [], [p], {}, {"params": None}, {"lr": 0.1}, {"params": [p, p]}, *groups]


def _adamw() -> Iterator[Call]:
    p = nn.Parameter(torch.ones(2))
    complex_p = nn.Parameter(torch.ones(2) + 0j)
    rates = [x for x in values.numbers() if not isinstance(x, Tensor)]
    wrong: Wrong = {
        "params": lambda: [None, 3, "params", [], [3], [None], [p, p], [p + 1], [complex_p], {"a": p}, nn.Linear, p],
        "lr": lambda: [*rates, -0.1, torch.ones(2), torch.tensor(True)],
        "betas": lambda: [
            None,
            0.9,
            "ab",
            (),
            (0.9,),
            (0.9, 0.99, 0.999),
            ("a", "b"),
            (None, 0.9),
            (True, 0.9),
            (1.0, 0.9),
            (0.9, 1.0),
            (-0.1, 0.9),
            (float("nan"), 0.9),
            (0.9, float("inf")),
            (values.HUGE, 0.9),
            (torch.tensor(0.9), 0.9),
            {0.9, 0.99},
        ],
        "eps": lambda: [*values.numbers(), -1e-8],
        "weight_decay": lambda: [*values.numbers(), -0.1],
        "amsgrad": values.flags,
        "maximize": values.flags,
        "capturable": values.flags,
        "differentiable": lambda: [*values.flags(), True],
        "foreach": lambda: [*values.not_flags_or_none(), True],
        "fused": lambda: [*values.not_flags_or_none(), False],
    }
    yield Call("AdamW", lambda: Prepared(gk.optim.AdamW, {"params": [p]}), wrong)
    opt = gk.optim.AdamW([p])
    state = partial(_state_of, opt)
    loading = Prepared(opt.load_state_dict, {"state_dict": opt.state_dict()}, state)
    yield Call("AdamW.load_state_dict", lambda: loading, {"state_dict": values.loaded_states})
    groups = Prepared(opt.add_param_group, {"param_group": {"params": [nn.Parameter(torch.ones(2))]}}, state)
    yield Call(
        "AdamW.add_param_group", lambda: groups, {"param_group": lambda: [*_param_groups(), {"params": [complex_p]}]}
    )
    yield Call("AdamW.step", lambda: Prepared(opt.step, {}, state), {"closure": lambda: [3, "x", []]})


def _state_of(opt: torch.optim.Optimizer) -> Any:
    return copied(opt.state_dict())


def _loaders() -> list[DataLoader[Any]]:
    return [DataLoader(torch.arange(8), batch_size=2) for _ in range(2)]  # type: ignore[arg-type]


def samplers() -> Iterator[Call]:
    loader = _loaders()[0]
    wrong: Wrong = {
        "loaders": lambda: [
            None,
            3,
            "ab",
            [],
            {},
            [3, loader],
            [iter(loader), loader],
            [loader, loader],
            {loader},
            loader,
        ],
        "scheme": values.strings,
        "epochs": values.integers_or_none,
        "steps": values.integers_or_none,
        "sizes": lambda: [3, "12", {}, [1], [1, 2, 3], [0, 1], [1.5, 2], [True, 2], [None, 1], [values.HUGE, 1]],
        "seed": partial(values.integers, 0),
    }
    yield Call("TaskSampler", lambda: Prepared(TaskSampler, {"loaders": _loaders(), "scheme": "joint"}), wrong)
    sampler = TaskSampler(_loaders())
    loading = Prepared(
        sampler.load_state_dict, {"state_dict": sampler.state_dict()}, lambda: copied(sampler.state_dict())
    )
    yield Call("TaskSampler.load_state_dict", lambda: loading, {"state_dict": values.loaded_states})


def other_interfaces() -> Iterator[Call]:
    optimizers = partial(values.of_class, torch.optim.Optimizer, False)

    def made(cls: type, **right: Any) -> Prepared:
        t = _Training()
        return Prepared(cls, {"optimizer": torch.optim.SGD(t.params, lr=0.1)} | right, t.state)

    yield Call(
        "PCGrad",
        partial(made, pcgrad.PCGrad),
        {
            "optimizer": optimizers,
            "reduction": values.strings,
            "compat": values.strings_or_none,
        },
        "of another library",
    )

    def backward() -> Prepared:
        t = _Training()
        return Prepared(pcgrad.PCGrad(torch.optim.SGD(t.params, lr=0.1)).pc_backward, {"objectives": t.losses}, t.state)

    yield Call(
        "PCGrad.pc_backward",
        backward,
        {
            "objectives": lambda: [x for x in _losses() if not isinstance(x, Tensor)],
            "retain_graph": values.flags,
        },
    )
    for cls in (amp.PCGradAMP, amp.GradVacAMP):
        of_class: Wrong = {
            "num_tasks": values.integers,
            "optimizer": optimizers,
            "scaler": partial(values.of_class, torch.amp.GradScaler, True),
            "reduction": values.strings,
            "cpu_offload": values.flags,
        }
        right: dict[str, Any] = {"num_tasks": 3}
        if cls is amp.GradVacAMP:
            of_class |= {"beta": values.shares, "DEVICE": lambda: ["nowhere", 0.5, [], b"cpu", {}]}
            right["DEVICE"] = "cpu"
        yield Call(cls.__name__, partial(made, cls, **right), of_class)

        def of_amp(method: str, cls: Any = cls, right: dict[str, Any] = right) -> Prepared:
            t = _Training()
            opt = cls(optimizer=torch.optim.SGD(t.params, lr=0.1), **right)
            found = {"mt_losses": t.losses} if method == "backward" else {"state_dict": opt.state_dict()}
            return Prepared(getattr(opt, method), found, lambda: [t.state(), copied(opt.state_dict())])

        losses = {"mt_losses": lambda: [x for x in _losses() if not isinstance(x, Tensor)]}
        yield Call(cls.backward.__qualname__, partial(of_amp, "backward"), losses, cls.__name__)
        states = {"state_dict": values.loaded_states}
        yield Call(cls.load_state_dict.__qualname__, partial(of_amp, "load_state_dict"), states, cls.__name__)

"""Every public function on CPU tensors while torch makes new tensors on another device by default.

That device is "meta", whose tensors have no numbers: whatever is made there by mistake raises, or is found there.
"""

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradkern as gk
from gradkern import reference
from gradkern.aggregators.methods import METHODS, ONE_BATCH
from gradkern.check.selfcheck import check, checks
from gradkern.compat.amp import GradVacAMP, PCGradAMP
from gradkern.compat.pcgrad import MODES, PCGrad
from gradkern.ops.partners import PARTNERS
from gradkern.sampling import SCHEMES, TaskSampler
from tests.models import problem

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def tensors(x: Any) -> list[Tensor]:
    """Return all tensors in lists, tuples, dictionaries, and steps' results."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, gk.SurgeryInfo):
        return tensors(vars(x))
    if isinstance(x, dict):
        return tensors(list(x.values()))
    return [found for part in x for found in tensors(part)] if isinstance(x, list | tuple) else []


def assert_on_the_cpu(*results: Any) -> None:
    found = tensors(list(results))
    assert found
    assert {x.device for x in found} == {CPU}


def methods() -> dict[str, Callable[[], gk.Aggregator]]:
    by_name: dict[str, Callable[[], gk.Aggregator]] = {name: row.make for name, row in METHODS.items()}
    by_partner = {f"pcgrad {partner}": lambda partner=partner: gk.PCGrad(partner) for partner in PARTNERS}
    return by_name | by_partner | {"pcgrad in order": lambda: gk.PCGrad(order=[2, 0, 1])}


def test_it_can_be_imported() -> None:
    code = "import torch\nwith torch.device('meta'):\n    import gradkern, gradkern.sampling, gradkern.compat.pcgrad"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", methods())
def test_methods_on_matrices(method: str, dtype: torch.dtype) -> None:
    """Three tasks; and forty of long rows, which other code computes, except where a method has three weights."""
    row = METHODS.get(method)
    of_three = "order" in method or (row is not None and row.tasks == 3)
    sizes = [(3, 50)] if of_three else [(3, 50), (40, 3000)]
    for size in sizes:
        J = torch.randn(size).to(dtype)
        offsets = torch.tensor([0, 20, size[1]])
        out = torch.empty(size[1], dtype=dtype)
        given = {} if row is None else row.beside(J)
        with torch.device("meta"):
            made = methods()[method]()
            assert_on_the_cpu(made(J, **given), made(J, **given), made(J, **given, out=out))
            assert_on_the_cpu(methods()[method]()(J, offsets, **given))
            state = made.state_dict()
            made.load_state_dict(state)
            assert all(x.device == CPU for x in tensors(dict(state)))


def test_operators() -> None:
    J, w, W, offsets = torch.randn(3, 50), torch.randn(3), torch.randn(2, 3), torch.tensor([0, 20, 50])
    J.requires_grad_()
    with torch.device("meta"):
        M = gk.gramian(J)
        results = [M, gk.gramian(J, offsets), gk.combine(J, w), gk.project(J, W)]
        (gradient,) = torch.autograd.grad(sum(x.sum() for x in results), J)
        scale = gk.ConflictLR().scale(M.detach())
        modified = gk.PCGrad().coefficients(M.detach())
    assert_on_the_cpu(*results, gradient, scale, modified)


BESIDE: dict[str, Callable[[], dict[str, Any]]] = {
    "alone": dict,
    "with modifiers": lambda: {"suppression": gk.Suppression(0.3), "conflict_lr": gk.ConflictLR(), "memory": True},
    "with blocks": lambda: {"suppression": gk.Suppression(0.3, 4, "all"), "groups": "parameter"},
}


@pytest.mark.parametrize("kind", [torch.optim.SGD, gk.optim.AdamW])
@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("method", [name for name in methods() if name not in METHODS or name in ONE_BATCH])
def test_training(method: str, beside: str, kind: Any) -> None:
    model, x, y = problem()
    inner = kind(model.named_parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with torch.device("meta"):
        opt = gk.SurgeryOptimizer(inner, methods()[method](), **BESIDE[beside]())
        for _ in range(2):
            opt.zero_grad()
            infos = [opt.backward(model.losses(x, y))]
            opt.step()
            opt.zero_grad()
            infos.append(opt.update([lambda t=t: model.loss(t, x, y) for t in range(3)], max_norm=1.0))
            infos.append(opt.update([scaler.scale(loss) for loss in model.losses(x, y)], scaler=scaler))
            scaler.update()
            h = model.trunk(x)
            heads = [
                (head(h).squeeze(-1) - target).square().mean() for head, target in zip(model.heads, y, strict=True)
            ]
            with opt.accumulate() as total:
                opt.backward(heads, features=h, batched=True)
                opt.backward([*model.losses(x, y)[:2], None])
            opt.step()
        state = copy.deepcopy(opt.state_dict())
        opt.load_state_dict(state)
        scalars = infos[0].scalars()
    assert scalars
    assert_on_the_cpu(infos, total.info, state, list(model.parameters()))
    assert all(p.isfinite().all() for p in model.parameters())


def test_adamw_loads_plain_numbers() -> None:
    p = nn.Parameter(torch.ones(2))
    with torch.device("meta"):
        opt = gk.optim.AdamW([p])
        p.grad = torch.ones_like(p)
        opt.step()
        state = copy.deepcopy(opt.state_dict())
        state["state"][0]["step"] = 1
        opt.load_state_dict(state)
        opt.step()
    assert_on_the_cpu(dict(opt.state))


@pytest.mark.parametrize("method", [gk.PCGrad, gk.GradVac, gk.Sum])
def test_sparse_gradients(method: Callable[[], gk.Aggregator]) -> None:
    table = nn.Embedding(4, 2, sparse=True)
    rows = torch.tensor([0, 1]), torch.tensor([1, 2])
    with torch.device("meta"):
        for _ in range(2):
            gk.backward(
                [table(rows[0]).sum(), -table(rows[1]).sum()],
                table,
                aggregator=method(),
                suppression=gk.Suppression(0.5),
            )
    assert table.weight.grad.is_sparse
    assert_on_the_cpu(table.weight.grad, table.weight.grad.coalesce().values())


@pytest.mark.parametrize("compat", MODES)
def test_pcgrad_around_an_optimizer(compat: str | None) -> None:
    model, x, y = problem()
    opt = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), compat=compat)
    with torch.device("meta"):
        opt.pc_backward(torch.stack(model.losses(x, y)))
        opt.step()
    assert_on_the_cpu([p.grad for p in model.parameters()])


@pytest.mark.parametrize("cpu_offload", [False, True])
@pytest.mark.parametrize("name", ["PCGradAMP", "GradVacAMP"])
def test_amp(name: str, cpu_offload: bool) -> None:
    model, x, y = problem()
    inner, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
    with torch.device("meta"):
        if name == "PCGradAMP":
            opt: Any = PCGradAMP(3, inner, scaler, cpu_offload=cpu_offload)
        else:
            opt = GradVacAMP(3, inner, "cpu", scaler, cpu_offload=cpu_offload)
        states = [copy.deepcopy(opt.state_dict())]
        for _ in range(2):
            opt.backward(model.losses(x, y))
            opt.step()
        states.append(opt.state_dict())
        opt.load_state_dict(states[0])
    assert_on_the_cpu(list(model.parameters()), states)


@pytest.mark.parametrize("name", ["PCGrad", "GradVac"])
def test_torchjds_aggregators(name: str) -> None:
    pytest.importorskip("torchjd")
    from gradkern.compat import torchjd as compat

    J = torch.randn(3, 50)
    expected = getattr(compat, name)()
    torch.manual_seed(1)
    updates = [expected(J) for _ in range(2)]
    with torch.device("meta"):
        aggregator = getattr(compat, name)()
        torch.manual_seed(1)
        assert all(torch.equal(aggregator(J), update) for update in updates)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_sampler(scheme: str) -> None:
    loaders, sizes = [[0, 1, 2], [10, 11]], [5, 7]
    expected = list(TaskSampler(loaders, scheme, epochs=2, sizes=sizes))
    with torch.device("meta"):
        sampler = TaskSampler(loaders, scheme, epochs=2, sizes=sizes)
        state = sampler.state_dict()
        assert list(sampler) == expected
        sampler.load_state_dict(state)
        assert list(sampler) == expected


def test_the_reference() -> None:
    grads = [torch.randn(5) for _ in range(3)]
    order = [[1, 2], [0, 2], [0, 1]]
    with torch.device("meta"):
        assert_on_the_cpu(
            reference.gramian(grads),
            reference.pcgrad(grads, order),
            reference.gradvac_updates([grads, grads], order),
            reference.mgda(grads),
            reference.attention_optimum(grads, 0.5),
            reference.suppressed(grads, reference.kept(1, 2, 0.5, 2, 0, 5), "all", list),
            reference.Memory(3, 5).step({0: grads[0]}, list),
        )


@pytest.mark.parametrize("name", ["combine", "gradvac", "method:mean"])
def test_the_self_check(name: str) -> None:
    assert name in checks("cpu")
    with torch.device("meta"):
        assert check(name, CPU).problem is None


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ONE_BATCH])
def test_training_with_two_batches(method: str, beside: str) -> None:
    model, x, y = problem()
    inner = gk.optim.AdamW(model.named_parameters(), lr=0.1)
    with torch.device("meta"):
        opt = gk.SurgeryOptimizer(inner, methods()[method](), **BESIDE[beside]())
        infos = [opt.backward(model.losses(x, y), second=model.losses(x + 1, y))]
        opt.step()
        opt.zero_grad()
        absent = [[*model.losses(z, y)[:2], None] for z in (x, x + 1)]
        infos.append(opt.update(absent[0], second=absent[1], max_norm=1.0))
        state = copy.deepcopy(opt.state_dict())
        opt.load_state_dict(state)
    assert_on_the_cpu(infos, state, list(model.parameters()))
    assert all(p.isfinite().all() for p in model.parameters())

"""Nothing between the losses and the new ``.grad`` asks the device for a number.

Without a GPU this is shown twice: the whole step under FakeTensorMode, where tensors have no numbers to read, and the
real Triton kernels in the interpreter under a mode that refuses every operation through which PyTorch reads a device.
With a GPU the step runs under torch's own check for synchronisation and is captured in a CUDA graph.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import gradkern as gk
from gradkern import reference
from gradkern.aggregators import methods
from gradkern.ops.partners import PARTNERS
from tests.interpreter import interpreted, triton_implementation
from tests.models import MultiHead, flat, problem
from tests.tolerances import TOLERANCES, assert_near

ORDER = [[0, 1, 2], [2, 0, 1], [1, 2, 0]]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


class ReadsTheHost(gk.Aggregator):
    """What no method of ours may be: it looks at a number before it decides."""

    def weights(self, M: Tensor) -> Tensor:
        w = torch.ones(M.shape[:-1], dtype=M.dtype, device=M.device)
        return w if M.sum() > 0 else 2 * w


SEVERAL_WAYS = (gk.PCGrad, gk.GradVac, gk.GradAttention, gk.aggregators.Scalarization)
METHODS: dict[str, Callable[[], gk.Aggregator]] = {
    **{name: row.make for name, row in methods.ONE_BATCH.items() if not issubclass(row.aggregator, SEVERAL_WAYS)},
    **{partner: partial(gk.PCGrad, partner) for partner in PARTNERS},
    "gradvac": gk.GradVac,
    "attention": partial(gk.GradAttention, 16, 8, 1),
    "attention-subset": partial(gk.GradAttention, 16, 8, 1, "subset"),
}
SCALARIZATIONS: dict[str, Callable[[], gk.Aggregator]] = {
    **{name: row.make for name, row in methods.ONE_BATCH.items() if issubclass(row.aggregator, SEVERAL_WAYS[-1])},
    "report": partial(gk.Sum, report=True),
}
BESIDE: dict[str, Callable[[], dict[str, Any]]] = {
    "alone": dict,
    "suppressed": lambda: {"suppression": gk.Suppression(0.4, seed=1), "conflict_lr": gk.ConflictLR()},
    "all-suppressed": lambda: {"suppression": gk.Suppression(0.4, 4, "all", seed=1), "memory": True},
}
each_method = pytest.mark.parametrize("method", METHODS)


def step(
    aggregator: gk.Aggregator, groups: str = "model", as_callables: bool = False, **beside: Any
) -> tuple[Any, ...]:
    """One step of a small model on the CPU, fake where a mode says so."""
    model, x, y = problem()
    inner = torch.optim.SGD(model.named_parameters(), lr=0.1)
    opt = gk.SurgeryOptimizer(inner, aggregator, groups=groups, **beside)
    opt.zero_grad()
    losses = [lambda t=t: model.loss(t, x, y) for t in range(3)] if as_callables else model.losses(x, y)
    info = opt.backward(losses)
    grads = [p.grad for p in model.parameters()]
    opt.step()
    return info, grads, model


@pytest.mark.parametrize(("as_callables", "beside"), [*((False, name) for name in BESIDE), (True, "alone")])
@pytest.mark.parametrize("groups", ["model", "parameter", "module"])
@pytest.mark.parametrize("method", METHODS | SCALARIZATIONS)
def test_the_step_runs_on_tensors_without_numbers(method: str, groups: str, as_callables: bool, beside: str) -> None:
    with FakeTensorMode():
        made = (METHODS | SCALARIZATIONS)[method]()
        info, grads, model = step(made, groups, as_callables, **BESIDE[beside]())
        assert info.weights is None or info.weights.shape[-1] == 3
        if info.gramian is not None:
            assert info.cosines.shape == info.conflicts.shape == info.gramian.shape
    for p, g in zip(model.parameters(), grads, strict=True):
        assert g.shape == p.shape
        assert g.stride() == p.stride()


def update(aggregator: gk.Aggregator, groups: str, max_norm: float | None, **beside: Any) -> tuple[gk.SurgeryInfo, Any]:
    """Take a step with no ``.grad`` in between."""
    model, x, y = problem()
    opt = gk.SurgeryOptimizer(gk.optim.AdamW(model.named_parameters()), aggregator, groups=groups, **beside)
    return opt.update(model.losses(x, y), max_norm=max_norm), opt


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("method", METHODS | SCALARIZATIONS)
def test_an_update_runs_on_tensors_without_numbers(method: str, max_norm: float | None, beside: str) -> None:
    with FakeTensorMode():
        info, opt = update((METHODS | SCALARIZATIONS)[method](), "parameter", max_norm, **BESIDE[beside]())
        assert (info.total_norm is None) == (max_norm is None)
        assert all(state["exp_avg"].shape == p.shape for p, state in opt.state.items())
        assert len(opt.state) == len(opt._tensors())


def micro_batches(aggregator: gk.Aggregator, batched: bool) -> tuple[gk.SurgeryInfo, MultiHead]:
    """A step of two micro-batches, whose heads go back to features first."""
    model, x, y = problem()
    opt = gk.SurgeryOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1), aggregator)
    with opt.accumulate() as total:
        for _ in range(2):
            h = model.trunk(x)
            losses = [(model.heads[t](h).squeeze(-1) - y[t]).square().mean() for t in range(3)]
            opt.backward(losses, features=h, batched=batched)
    assert total.info is not None
    return total.info, model


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("method", METHODS | SCALARIZATIONS)
def test_micro_batches_on_features_run_on_tensors_without_numbers(method: str, batched: bool) -> None:
    with FakeTensorMode():
        info, model = micro_batches((METHODS | SCALARIZATIONS)[method](), batched)
        assert info.weights is None or info.weights.shape == (3,)
        assert all(p.grad.shape == p.shape for p in model.parameters())


def test_a_method_that_reads_a_number_is_caught() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        step(ReadsTheHost())


class RefusesReads(TorchDispatchMode):
    """Raises on every operation that would make the host wait for a device; looks inside our own operators."""

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "masked_select", "equal", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if any(name.startswith(read) for read in self.READS):
            raise AssertionError(f"{func} reads the device")
        if name == "_to_copy" and (kwargs or {}).get("device") not in (None, args[0].device):
            raise AssertionError(f"{func} copies between devices")
        if func.namespace == "gradkern":
            with self:
                return triton_implementation(func)(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def refused_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods that read a CPU tensor without an operator that a mode could see."""

    def refuse(*args: Any) -> None:
        raise AssertionError("a method reads the device")

    for name in ("tolist", "numpy", "item", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(Tensor, name, refuse)


@interpreted
@pytest.mark.parametrize(("groups", "beside"), [*(("model", name) for name in BESIDE), ("parameter", "alone")])
@each_method
def test_the_triton_path_reads_nothing(method: str, groups: str, beside: str, request: pytest.FixtureRequest) -> None:
    step(METHODS[method](), groups, **BESIDE[beside]())  # work that is done once: layouts
    made, options = METHODS[method](), BESIDE[beside]()
    request.getfixturevalue("refused_methods")
    with RefusesReads():
        step(made, groups, **options)


@interpreted
@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("method", ["all", "gradvac", "attention"])
def test_an_update_by_the_kernels_reads_nothing(
    method: str, max_norm: float | None, beside: str, request: pytest.FixtureRequest
) -> None:
    update(METHODS[method](), "model", max_norm, **BESIDE[beside]())
    made, options = METHODS[method](), BESIDE[beside]()
    request.getfixturevalue("refused_methods")
    with RefusesReads():
        update(made, "model", max_norm, **options)


@interpreted
@pytest.mark.parametrize("batched", [False, True])
def test_micro_batches_on_features_by_the_kernels_read_nothing(batched: bool, refused_methods: None) -> None:
    with RefusesReads():
        micro_batches(gk.PCGrad(), batched)


@interpreted
def test_a_read_on_the_triton_path_is_caught() -> None:
    with RefusesReads(), pytest.raises(AssertionError, match="reads the device"):
        step(ReadsTheHost())


@interpreted
@pytest.mark.parametrize("read", [Tensor.tolist, Tensor.numpy])
def test_a_read_without_an_operator_is_caught(read: Callable[[Tensor], Any], refused_methods: None) -> None:
    class Reads(gk.Aggregator):
        def weights(self, M: Tensor) -> Tensor:
            getattr(M, read.__name__)()
            return M.diagonal(dim1=-2, dim2=-1)

    with RefusesReads(), pytest.raises(AssertionError, match="a method reads the device"):
        step(Reads())


@interpreted
@pytest.mark.parametrize("groups", ["model", "module"])
def test_both_back_ends_take_the_same_step(groups: str, request: pytest.FixtureRequest) -> None:
    info, grads, _ = step(gk.PCGrad(order=ORDER), groups)
    calls = request.getfixturevalue("triton_serves_the_cpu")
    triton_info, triton_grads, _ = step(gk.PCGrad(order=ORDER), groups)
    assert calls == ["gramian.tensors", "pcgrad", "combine.tensors"]
    assert_near(triton_info.gramian, info.gramian, info.gramian.abs().max(), TOLERANCES[torch.float32])
    for a, b in zip(triton_grads, grads, strict=True):
        assert_near(a, b, b.abs().max(), 10 * TOLERANCES[torch.float32])  # 10: weights magnify the Gramian's rounding


@needs_gpu
@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("groups", ["model", "parameter"])
@pytest.mark.parametrize("method", [*METHODS, "sum"])
def test_the_step_never_synchronises(method: str, groups: str, beside: str) -> None:
    model, x, y = problem(device="cuda")
    inner = torch.optim.AdamW(model.named_parameters(), capturable=True)
    options = BESIDE[beside]()
    opt = gk.SurgeryOptimizer(inner, (METHODS | SCALARIZATIONS)[method](), groups=groups, **options)
    for number in range(3):  # the first two compile kernels and lay out work, once
        torch.cuda.set_sync_debug_mode("error" if number == 2 else "default")
        try:
            opt.zero_grad()
            losses = model.losses(x, y)
            if "memory" in options and number > 0:
                losses[1] = None
            opt.backward(losses)
            opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def captured(step: Callable[[], gk.SurgeryInfo]) -> tuple[torch.cuda.CUDAGraph, gk.SurgeryInfo]:
    """``step`` as a CUDA graph, and what it tells: tensors that each replay fills. Capturing it runs nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        info = step()
    return graph, info


def warmed_up(step: Callable[[], gk.SurgeryInfo]) -> None:
    """Three steps on a side stream, as a capture needs: they compile kernels, lay out work and begin all state."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)


# Nothing random: orders are fixed, and GradAttention draws all the entries there are.
FIXED: dict[str, Callable[[], gk.Aggregator]] = {
    **METHODS,
    "all": partial(gk.PCGrad, order=ORDER),
    "random": partial(gk.PCGrad, "random", order=ORDER),
    "gradvac": partial(gk.GradVac, 0.5, order=ORDER),
    "attention": partial(gk.GradAttention, 4096, 8, 1),
    "attention-subset": partial(gk.GradAttention, 4096, 8, 1, "subset"),
    "sum": gk.Sum,
}


@needs_gpu
@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("groups", ["model", "parameter"])
@pytest.mark.parametrize("method", FIXED)
def test_a_captured_step_replays_with_new_data(method: str, groups: str, beside: str) -> None:
    """Each replay is the step that a twin takes without a graph, on the same data and from the same state."""
    model, x, y = problem(device="cuda")
    made, options = FIXED[method](), BESIDE[beside]()
    options.pop("memory", None)  # of no use here: which tasks are present is fixed when a step is captured

    def optimizer(model: MultiHead, made: gk.Aggregator, options: dict[str, Any]) -> gk.SurgeryOptimizer:
        # Without momentum torch's optimizer has no state: the twins' surgery is all that remembers anything.
        return gk.SurgeryOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1), made, groups=groups, **options)

    def step(opt: gk.SurgeryOptimizer, model: MultiHead) -> gk.SurgeryInfo:
        opt.zero_grad()
        info = opt.backward(model.losses(x, y))
        opt.step()
        return info

    opt = optimizer(model, made, options)
    warmed_up(lambda: step(opt, model))
    opt.zero_grad()
    twin_model, twin_made, twin_options = copy.deepcopy((model, made, options))
    twin = optimizer(twin_model, twin_made, twin_options)
    graph, info = captured(lambda: step(opt, model))
    masks = []
    for number in (3, 4):  # of the step, after the three of the warm-up
        x.copy_(torch.randn_like(x))
        y.copy_(3 * torch.randn_like(y))
        graph.replay()
        expected_info = step(twin, twin_model)
        pairs = list(zip(model.parameters(), twin_model.parameters(), strict=True))
        told = ("losses", "gramian", "weights", "targets", "attention", "kept", "step_scale")
        values = [(getattr(info, name), getattr(expected_info, name)) for name in told]
        assert all((a is None) == (b is None) for a, b in values)
        values = [(a, b) for a, b in values if a is not None]
        for a, b in [*((p.grad, q.grad) for p, q in pairs), *pairs, *values]:
            # 1e-4: inside a graph cuBLAS may choose another algorithm, whose roundings the weights magnify and the
            # steps so far pass on.
            assert_near(a.detach(), b.detach(), b.detach().norm(), 1e-4)
        if opt.suppression is not None:
            masks.append(flat([p.grad for p in model.trunk.parameters()], list(model.trunk.parameters())) == 0)
            assert torch.equal(masks[-1], ~kept_of_trunk(opt.suppression, model, number))
            assert opt.suppression.state_dict()["step"] == number + 1
    assert not masks or not torch.equal(*masks)


@needs_gpu
@pytest.mark.parametrize("beside", ["alone", "suppressed"])
@pytest.mark.parametrize("max_norm", [None, 0.1])
@pytest.mark.parametrize("method", ["all", "gradvac", "attention"])
def test_a_captured_training_step_replays_with_new_data(method: str, max_norm: float | None, beside: str) -> None:
    """Forward, backward, surgery and AdamW in one graph, with a learning rate that changes, beside an eager twin."""
    model, x, y = problem(device="cuda")
    made, options = FIXED[method](), BESIDE[beside]()
    rate = torch.tensor(0.01, device="cuda")

    def optimizer(model: MultiHead, made: gk.Aggregator, options: dict[str, Any]) -> gk.SurgeryOptimizer:
        return gk.SurgeryOptimizer(gk.optim.AdamW(model.named_parameters(), lr=rate), made, **options)

    opt = optimizer(model, made, options)
    warmed_up(lambda: opt.update(model.losses(x, y), max_norm=max_norm))
    twin_model, twin_made, twin_options = copy.deepcopy((model, made, options))
    twin = optimizer(twin_model, twin_made, twin_options)
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    twin.param_groups[0]["lr"] = rate  # in place of the copy
    graph, info = captured(lambda: opt.update(model.losses(x, y), max_norm=max_norm))
    for number in range(3):
        rate.fill_(0.01 / (1 + number))
        x.copy_(torch.randn_like(x))
        y.copy_(3 * torch.randn_like(y))
        graph.replay()
        expected = twin.update(twin_model.losses(x, y), max_norm=max_norm)
        for p, q in zip(model.parameters(), twin_model.parameters(), strict=True):
            # 1e-4: as above, of a step whose size does not depend on the gradient's.
            assert_near(p.detach(), q.detach(), q.detach().norm() + 1, 1e-4)
        assert (info.total_norm is None) == (expected.total_norm is None)


@needs_gpu
def test_a_captured_training_step_draws_anew() -> None:
    """Random orders and masks: from one state and on one batch, replays leave the parameters in different places."""
    model, x, y = problem()
    model, x, y = model.cuda(), x.cuda(), y.cuda()
    opt = gk.SurgeryOptimizer(gk.optim.AdamW(model.parameters()), gk.PCGrad(), suppression=gk.Suppression(0.4, seed=1))
    warmed_up(lambda: opt.update(model.losses(x, y)))
    everything = [*model.parameters(), *(value for state in opt.state.values() for value in state.values())]
    before = [value.detach().clone() for value in everything]
    graph, info = captured(lambda: opt.update(model.losses(x, y)))
    weights, kept, places = [], [], []
    for _ in range(16):
        with torch.no_grad():
            torch._foreach_copy_(everything, before)
        graph.replay()
        weights.append(info.weights.clone())
        kept.append(info.kept.clone())
        places.append(torch.cat([p.detach().flatten() for p in model.trunk.parameters()]))
    assert all(len(torch.stack(values).unique(dim=0)) > 1 for values in (weights, kept, places))


def kept_of_trunk(suppression: gk.Suppression, model: MultiHead, step: int) -> Tensor:
    """Return the trunk's entries that the reference keeps in a step."""
    named = list(model.named_parameters())
    p, block = suppression.p, suppression.block
    units = reference.first_units([parameter.numel() for _, parameter in named], block)
    parts = [
        reference.kept(suppression.seed, step, p, block, unit, parameter.numel())
        for (name, parameter), unit in zip(named, units, strict=True)
        if name.startswith("trunk")
    ]
    return torch.cat(parts)


@needs_gpu
@pytest.mark.parametrize("method", ["all", "random", "gradvac", "attention", "attention-subset"])
def test_a_captured_step_draws_anew(method: str) -> None:
    """Random orders and entries come from the default generator, which every replay moves on."""
    model, x, y = problem()  # on the CPU, where numbers do not depend on the device: their orders matter
    model, x, y = model.cuda(), x.cuda(), y.cuda()
    made = METHODS[method]()
    trunk = list(model.trunk.parameters())

    def step() -> gk.SurgeryInfo:
        model.zero_grad()
        return gk.backward(model.losses(x, y), model, aggregator=made)

    warmed_up(step)
    graph, info = captured(step)
    weights, gradients, networks = [], [], []
    for _ in range(16):
        graph.replay()
        weights.append(info.weights.clone())
        gradients.append(flat([p.grad for p in trunk], trunk))
        networks.append([p.detach().clone() for p in made.parameters()])
    assert torch.stack(weights).isfinite().all()
    assert torch.stack(gradients).isfinite().all()
    assert len(torch.stack(weights).unique(dim=0)) > 1
    if method == "attention-subset":
        assert len((torch.stack(gradients) != 0).unique(dim=0)) > 1
    if networks[0]:
        # α sums to 1 in float64, and three weights are rounded to float32.
        assert_near(torch.stack(weights).sum(-1).cpu(), torch.ones(16), 1.0, TOLERANCES[torch.float32])
        assert not any(torch.equal(a, b) for a, b in zip(networks[0], networks[1], strict=True))

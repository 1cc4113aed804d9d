"""Nothing between the losses and the new ``.grad`` asks the device for a number.

Without a GPU this is shown twice: the whole step under FakeTensorMode, where tensors have no numbers to read, and the
real Triton kernels in the interpreter under a mode that refuses every operation through which PyTorch reads a device.
With a GPU the step runs under torch's own check for synchronisation and is captured in a CUDA graph.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import gradkern as gk
from gradkern.aggregators.pcgrad import PARTNERS
from tests.interpreter import interpreted, triton_implementations
from tests.models import flat, problem
from tests.tolerances import TOLERANCES, assert_near

ORDER = [[0, 1, 2], [2, 0, 1], [1, 2, 0]]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


class ReadsTheHost(gk.Aggregator):
    """What no method of ours may be: it looks at a number before it decides."""

    def weights(self, M: Tensor) -> Tensor:
        w = torch.ones(M.shape[:-1], dtype=M.dtype, device=M.device)
        return w if M.sum() > 0 else 2 * w


METHODS: dict[str, Callable[[], gk.Aggregator]] = {
    **{partner: partial(gk.PCGrad, partner) for partner in PARTNERS},
    "gradvac": gk.GradVac,
    "attention": partial(gk.GradAttention, 16, 8, 1),
    "attention-subset": partial(gk.GradAttention, 16, 8, 1, "subset"),
}
SCALARIZATIONS = {"sum": gk.Sum, "mean": gk.Mean, "constant": lambda: gk.Constant([1.0, 2.0, 3.0])}
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


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("as_callables", [False, True])
@pytest.mark.parametrize("groups", ["model", "parameter", "module"])
@pytest.mark.parametrize("method", METHODS | SCALARIZATIONS)
def test_the_step_runs_on_tensors_without_numbers(method: str, groups: str, as_callables: bool, beside: str) -> None:
    with FakeTensorMode():
        made = (METHODS | SCALARIZATIONS)[method]()
        info, grads, model = step(made, groups, as_callables, **BESIDE[beside]())
        assert info.weights.shape[-1] == 3
        if info.gramian is not None:
            assert info.cosines.shape == info.conflicts.shape == info.gramian.shape
    for p, g in zip(model.parameters(), grads, strict=True):
        assert g.shape == p.shape
        assert g.stride() == p.stride()


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
                return triton_implementations()[func](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def refused_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods that read a CPU tensor without an operator that a mode could see."""

    def refuse(*args: Any) -> None:
        raise AssertionError("a method reads the device")

    for name in ("tolist", "numpy", "item", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(Tensor, name, refuse)


@interpreted
@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("groups", ["model", "parameter"])
@each_method
def test_the_triton_path_reads_nothing(method: str, groups: str, beside: str, request: pytest.FixtureRequest) -> None:
    step(METHODS[method](), groups, **BESIDE[beside]())  # work that is done once: layouts
    made, options = METHODS[method](), BESIDE[beside]()
    request.getfixturevalue("refused_methods")
    with RefusesReads():
        step(made, groups, **options)


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
    assert calls == ["gramian_tensors", "pcgrad", "combine_tensors"]
    assert_near(triton_info.gramian, info.gramian, info.gramian.abs().max(), TOLERANCES[torch.float32])
    for a, b in zip(triton_grads, grads, strict=True):
        assert_near(a, b, b.abs().max(), 10 * TOLERANCES[torch.float32])  # 10: weights magnify the Gramian's rounding


@needs_gpu
@pytest.mark.parametrize("method", [gk.PCGrad, gk.Sum])
@pytest.mark.parametrize("groups", ["model", "parameter"])
def test_the_step_never_synchronises(method: type[gk.Aggregator], groups: str) -> None:
    model, x, y = problem(device="cuda")
    opt = gk.SurgeryOptimizer(torch.optim.AdamW(model.named_parameters(), capturable=True), method(), groups=groups)
    for checked in (False, True):  # the first step compiles kernels and lays out work, once
        torch.cuda.set_sync_debug_mode("error" if checked else "default")
        try:
            opt.zero_grad()
            opt.backward(model.losses(x, y))
            opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_a_captured_step_replays_with_new_data() -> None:
    model, x, y = problem(device="cuda")
    trunk = list(model.trunk.parameters())
    method = gk.PCGrad(order=ORDER)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad()
            gk.backward(model.losses(x, y), model, aggregator=method)
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gk.backward(model.losses(x, y), model, aggregator=method)
    for seed in (1, 2):
        torch.manual_seed(seed)
        x.copy_(torch.randn_like(x))
        y.copy_(3 * torch.randn_like(y))
        for p in model.parameters():
            p.grad.zero_()
        graph.replay()
        replayed = flat([p.grad for p in trunk], trunk)
        kept = [p.grad for p in model.parameters()]
        model.zero_grad()
        gk.backward(model.losses(x, y), model, aggregator=method)
        expected = flat([p.grad for p in trunk], trunk)
        assert_near(replayed, expected, expected.norm(), TOLERANCES[torch.float32])
        for p, g in zip(model.parameters(), kept, strict=True):
            p.grad = g

"""What keeps a step cheap on the host changes no result: cached launches, tables of addresses, direct calls.

Times are not asserted: a busy machine takes long for anything.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradkern.ops.pytorch.rows import gramian_tensors
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gradkern.ops import eager as direct
from gradkern.ops import registration

ROOT = Path(__file__).parents[2]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


# Cached launches


def test_cached_launches_are_tritons_own() -> None:
    """Built in a process of its own: this one may have told Triton to interpret."""
    pytest.importorskip("triton", reason="no Triton on this platform")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "tests/launches.py"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]


def gradients(T: int, dtype: torch.dtype, pad: int, device: str) -> list[Tensor | None]:
    """Of five parameters, each gradient ``pad`` numbers behind a boundary of 16 bytes, one missing."""
    grads: list[Tensor | None] = [
        torch.randn(pad + size, device=device).to(dtype)[pad:] for _ in range(T) for size in (5000, 1, 4096, 77, 9000)
    ]
    grads[2] = None
    return grads


SEGMENTS = [0, 1, 0, 1, 0]


def step(T: int, dtype: torch.dtype, pad: int) -> list[Tensor]:
    """Everything the Triton back end computes in a step, on a GPU, from numbers that only the arguments determine."""
    from gradkern.ops.triton import rows as cuda

    torch.manual_seed(1)
    grads = gradients(T, dtype, pad, "cuda")
    M = cuda.gramian_tensors(grads, SEGMENTS, 2)
    C = cuda.pcgrad(M, torch.rand(2, T, T, device="cuda"), "all")
    out = [torch.full_like(g, torch.nan) for g in grads[5:]][:5]
    cuda.combine_tensors(grads, C.sum(1), SEGMENTS, out)
    X = cuda.gather(grads, [len(g) for g in out], torch.tensor([3, 5000, 9097, 18000], device="cuda"))
    return [M, C, *out, X]


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cached_launches_give_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Aligned tensors first, then others, and the other way round; each against launches of which none is cached."""
    from gradkern.kernels import launch

    cases = [(T, pad) for T in (2, 3, 13, 40) for pad in (0, 1)]
    expected = {}
    for T, pad in cases:
        monkeypatch.setattr(launch, "_compiled", {})
        expected[T, pad] = step(T, dtype, pad)
    for order in (cases, cases[::-1]):
        monkeypatch.setattr(launch, "_compiled", {})
        for T, pad in [*order, *order]:
            for a, b in zip(step(T, dtype, pad), expected[T, pad], strict=True):
                assert torch.equal(a, b)


# Tables of addresses


class Stream:
    """A queue of work that is done only when told so, as a device far behind the host does it."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []
        self.n_copies = 0

    def work(self, n: int | None = None) -> None:
        """Do the first ``n`` things that wait, or all."""
        for do in self.waiting[:n]:
            do()
        self.waiting = self.waiting[len(self.waiting) if n is None else n :]


class Event:
    """Done when the stream gets there; complete before it was ever recorded, as CUDA's."""

    def __init__(self) -> None:
        self.done = True

    def record(self, stream: Stream) -> None:
        self.done = False
        stream.waiting.append(lambda: setattr(self, "done", True))

    def query(self) -> bool:
        return self.done


class Pinned:
    """Memory from which the current stream copies when it gets there, not when it is told to."""

    def __init__(self, numbers: np.ndarray, device: "Device") -> None:
        self.numbers, self.device = numbers, device

    def __getitem__(self, index: slice) -> "Pinned":
        return Pinned(self.numbers[index], self.device)

    def to(self, device: torch.device, non_blocking: bool) -> Tensor:
        assert non_blocking
        stream, table = self.device.stream, torch.full((len(self.numbers),), -1)
        stream.n_copies += 1
        stream.waiting.append(lambda: table.copy_(torch.from_numpy(self.numbers)))
        return table


class Device:
    """What ``cuda_tables`` asks of PyTorch and CUDA, for streams of our own."""

    name = torch.device("cuda", 0)

    def __init__(self) -> None:
        self.stream = Stream()
        self.n_stagings = 0
        self.capturing = False

    def new_staging(self, size: int) -> Any:
        from gradkern.ops.triton import address_tables as cuda_tables

        self.n_stagings += 1
        numbers = np.full(size, -2)
        return cuda_tables._Staging(Pinned(numbers, self), numbers, Event())

    def table(self, addresses: Sequence[int]) -> Tensor:
        from gradkern.ops.triton import address_tables as cuda_tables

        rows = cuda_tables.table_rows(tuple(addresses), 1, torch.float32, self.name)
        assert (rows.count, rows.stride, rows.table) == (len(addresses), 1, True)
        return rows.source


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    pytest.importorskip("triton", reason="no Triton on this platform")
    from gradkern.ops.triton import address_tables as cuda_tables

    device = Device()
    monkeypatch.setattr(cuda_tables, "_rings", type(cuda_tables._rings)(cuda_tables._rings.default_factory))
    monkeypatch.setattr(cuda_tables, "_new_staging", device.new_staging)
    monkeypatch.setattr(cuda_tables, "capturing", lambda given: device.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda given: device.stream)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: id(device.stream), raising=False)
    cuda_tables._copied.cache_clear()
    yield device
    cuda_tables._copied.cache_clear()


def test_a_step_copies_each_table_once(simulated: Device) -> None:
    """The Gramian's rows, the same for the combination, and its outputs; nothing in a step at the same addresses."""
    rows, out = range(1 << 40, (1 << 40) + 597), range(1 << 41, (1 << 41) + 199)
    for n_copies in (2, 2):
        tables = [simulated.table(addresses) for addresses in (rows, rows, out)]
        assert simulated.stream.n_copies == n_copies
    assert tables[0] is tables[1]
    simulated.stream.work()
    assert tables[0].tolist() == list(rows)
    assert tables[2].tolist() == list(out)
    simulated.table([*rows[:-1], 0])
    assert simulated.stream.n_copies == 3


def test_staging_memory_is_reused_only_when_it_has_been_copied_from(simulated: Device) -> None:
    """Whatever the device has got done when, each table ends up with its own addresses, and the host never waits."""
    generator = np.random.default_rng(0)
    made = []
    for i in range(200):
        addresses = generator.integers(0, 1 << 47, generator.integers(1, 20)).tolist()
        made.append((simulated.table(addresses), addresses))
        simulated.stream.work(generator.integers(0, 6) if i < 100 else None)
    for table, addresses in made:
        assert table.tolist() == addresses
    assert simulated.n_stagings < 100  # it is reused


def test_with_the_device_behind_there_is_new_staging_memory_and_then_no_more(simulated: Device) -> None:
    for _ in range(3):
        for i in range(10):
            simulated.table([i, *range(100, 130)])
            simulated.table([i])
        simulated.stream.work()
    assert simulated.n_stagings == 20  # of two sizes; the tables themselves are there from the first round on
    for i in range(10, 20):
        simulated.table([i, *range(100, 130)])
    assert simulated.n_stagings == 20


def test_each_stream_has_its_own_table(simulated: Device) -> None:
    first, streams = simulated.table([1, 2, 3]), [simulated.stream, Stream()]
    simulated.stream = streams[1]
    second = simulated.table([1, 2, 3])
    assert first is not second
    assert [stream.n_copies for stream in streams] == [1, 1]
    streams[1].work()
    assert second.tolist() == [1, 2, 3]  # whatever the other stream has got done
    simulated.stream = streams[0]
    assert simulated.table([1, 2, 3]) is first


def test_a_capture_neither_takes_nor_leaves_a_table(simulated: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    from gradkern.ops.triton import address_tables as cuda_tables

    kept, pinned = [], Pinned(np.array([1, 2, 3]), simulated)
    monkeypatch.setattr(cuda_tables, "keep", kept.append)
    before = simulated.table([1, 2, 3])
    simulated.capturing = True
    with monkeypatch.context() as patched:
        patched.setattr(torch, "tensor", lambda values, dtype, device, pin_memory: pinned)
        during = [simulated.table([1, 2, 3]) for _ in range(2)]
    assert len({id(table) for table in (before, *during)}) == 3
    assert kept == [pinned, pinned]
    assert simulated.n_stagings == 1
    simulated.capturing = False
    assert simulated.table([1, 2, 3]) is before


@needs_gpu
def test_a_step_on_the_device_copies_each_table_once() -> None:
    from gradkern.ops.triton import address_tables as cuda_tables
    from gradkern.ops.triton import rows as cuda

    grads = gradients(3, torch.float32, 0, "cuda")
    out = [torch.empty_like(g) for g in grads[5:10]]
    w = torch.ones(2, 3, device="cuda")
    cuda_tables._copied.cache_clear()
    for n_copies in (2, 2):
        cuda.gramian_tensors(grads, SEGMENTS, 2)
        cuda.combine_tensors(grads, w, SEGMENTS, out)
        assert cuda_tables._copied.cache_info().misses == n_copies
    with torch.cuda.stream(torch.cuda.Stream()):
        cuda.gramian_tensors(grads, SEGMENTS, 2)
    assert cuda_tables._copied.cache_info().misses == 3


@needs_gpu
def test_tables_are_right_with_the_device_far_behind() -> None:
    from gradkern.ops.triton import rows as cuda

    X, w = torch.arange(40000.0, device="cuda"), torch.ones(1, 30, device="cuda")
    out = [torch.empty(1, device="cuda") for _ in range(300)]

    def combine_all() -> None:
        for k, o in enumerate(out):
            cuda.combine_tensors(list(X[k : k + 30].split(1)), w, [0], [o])

    combine_all()  # compiles
    torch._foreach_zero_(out)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # cycles: some 0.1 s, longer than the host takes for all of the following
    torch.cuda.set_sync_debug_mode("error")
    try:
        combine_all()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Of small whole numbers float32 sums are exact.
    assert torch.cat(out).tolist() == [sum(range(k, k + 30)) for k in range(300)]


@needs_gpu
def test_a_graph_reads_its_own_table_at_each_replay() -> None:
    from gradkern.ops.triton import address_tables as cuda_tables
    from gradkern.ops.triton import rows as cuda

    grads = gradients(3, torch.float32, 1, "cuda")
    expected = cuda.gramian_tensors(grads, SEGMENTS, 2)
    before = cuda_tables._copied.cache_info()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        M = cuda.gramian_tensors(grads, SEGMENTS, 2)
    assert cuda_tables._copied.cache_info() == before
    cuda_tables._copied.cache_clear()
    for _ in range(2 * cuda_tables.TABLES):
        cuda.gramian_tensors(gradients(3, torch.float32, 1, "cuda"), SEGMENTS, 2)
    for _ in range(2):
        M.fill_(torch.nan)
        graph.replay()
        assert torch.equal(M, expected)


# Direct calls


def calls(device: str = "cpu") -> dict[str, tuple[Any, Callable[..., Any], tuple[Any, ...], list[Tensor]]]:
    """By name: the operator, the direct call, its arguments, and which of them it writes to."""
    torch.manual_seed(2)
    ops = torch.ops.gradkern
    grads = gradients(3, torch.float32, 0, device)
    numels = [5000, 1, 4096, 77, 9000]
    out = [torch.zeros(n, device=device) for n in numels]
    w, M, keys = (torch.randn(2, 3, device=device), *torch.rand(2, 2, 3, 3, device=device))
    M = M @ M.mT - 0.5
    targets, moving = torch.rand(2, 3, 3, dtype=torch.float64, device=device), torch.ones(3, device=device).bool()
    units, mask = [0, -1, 5000, 9096, 9176], torch.tensor([1, 2, 1 << 31], device=device)
    index = torch.tensor([3, 5000, 9097, 18000], device=device)
    values = torch.randn(4, device=device)
    return {
        "gramian.tensors": (ops.gramian.tensors, direct.gramian_tensors, (grads, SEGMENTS, 2), []),
        "gramian.masked": (ops.gramian.masked, direct.gramian_masked, (grads, SEGMENTS, 2, units, 1, mask), []),
        "combine.tensors": (ops.combine.tensors, direct.combine_tensors, (grads, w, SEGMENTS, out), out),
        "combine.masked": (ops.combine.masked, direct.combine_masked, (grads, w, SEGMENTS, units, 1, mask, out), out),
        "gather": (ops.gather.default, direct.gather, (grads, numels, index), []),
        "scatter": (ops.scatter.default, direct.scatter, (values, numels, index, out), out),
        "pcgrad": (ops.pcgrad.default, direct.pcgrad, (M, keys, "all"), []),
        "gradvac": (ops.gradvac.default, direct.gradvac, (M, keys, targets, moving, 0.1), [targets]),
        "pcgrad.tensors": (
            ops.pcgrad.tensors,
            direct.pcgrad_tensors,
            (grads, SEGMENTS, 2, keys, "all", False, None, None, out),
            out,
        ),
        "pcgrad.masked": (
            ops.pcgrad.masked,
            direct.pcgrad_masked,
            (grads, SEGMENTS, 2, keys, "all", False, None, None, units, 1, mask, True, out),
            out,
        ),
        "gradvac.tensors": (
            ops.gradvac.tensors,
            direct.gradvac_tensors,
            (grads, SEGMENTS, 2, keys, targets, moving, 0.1, False, None, None, out),
            [targets, *out],
        ),
        "gradvac.masked": (
            ops.gradvac.masked,
            direct.gradvac_masked,
            (grads, SEGMENTS, 2, keys, targets, moving, 0.1, False, None, None, units, 1, mask, True, out),
            [targets, *out],
        ),
    }


each_call = pytest.mark.parametrize("name", calls())


class Watches(TorchDispatchMode):
    """Notes which of our operators it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "gradkern":
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@each_call
def test_a_direct_call_is_the_operators(name: str, back_end: str, request: pytest.FixtureRequest) -> None:
    results = []
    for which in (0, 1):
        call = calls()[name]
        result = call[which](*call[2])
        results.append([*returned(result), *call[3]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    if back_end == "triton":
        served = request.getfixturevalue("triton_serves_the_cpu")
        assert served.count(name.replace(".", "_")) == 2  # the whole surgery calls its steps besides


@each_call
def test_a_direct_call_goes_to_the_function_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, call, arguments, _ = calls()[name]
    given = []
    monkeypatch.setitem(registration.serving[f"gradkern::{name}"], "cpu", lambda *args: given.append(args))
    assert call(*arguments) is None
    assert all(a is b for a, b in zip(given[0], arguments, strict=True))


@each_call
def test_whoever_has_to_see_the_operator_does(name: str) -> None:
    op, call, arguments, _ = calls()[name]
    with Watches() as mode:
        call(*arguments)
    assert mode.seen == [op.name()]
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(a) if isinstance(a, Tensor) else fake_list(a, mode) for a in arguments]
        expected, found = op(*fake), call(*fake)
    outside = call(*fake)  # the tensors say so themselves
    for other in (found, outside):
        for a, b in zip(returned(other), returned(expected), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


def returned(result: Any) -> list[Tensor]:
    """What a call returns, be it nothing, a tensor or several."""
    return list(result) if isinstance(result, tuple) else [] if result is None else [result]


def fake_list(argument: Any, mode: FakeTensorMode) -> Any:
    if not isinstance(argument, list):
        return argument
    return [mode.from_tensor(item) if isinstance(item, Tensor) else item for item in argument]


class Unit(Tensor):
    """A tensor that is more than its numbers."""


def test_tensors_that_are_more_than_numbers_go_to_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("called directly")

    _, call, (M, keys, partner), _ = calls()["pcgrad"]
    expected = call(M, keys, partner)
    monkeypatch.setitem(registration.serving["gradkern::pcgrad"], "cpu", refuse)
    assert torch.equal(call(M.as_subclass(Unit), keys, partner).as_subclass(Tensor), expected)
    negative = torch._neg_view(-M)
    assert negative.is_neg()
    assert torch.equal(call(negative, keys, partner), expected)
    monkeypatch.setitem(registration.serving["gradkern::gramian.tensors"], "cpu", refuse)
    grads = [torch.ones(3), torch.ones(3).as_subclass(Unit)]
    assert torch.equal(direct.gramian_tensors(grads, [0], 1).as_subclass(Tensor), torch.full((1, 2, 2), 3.0))
    with pytest.raises(ValueError, match="grads holds no tensor"):
        direct.gramian_tensors([None, None], [0], 1)


def test_under_a_transform_it_is_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []
    monkeypatch.setitem(registration.serving["gradkern::gramian.tensors"], "cpu", lambda *args: reached.append(args))

    def program(x: Tensor) -> Tensor:
        direct.gramian_tensors([x], [0], 1)
        return x.sum()

    torch.func.grad(program)(torch.ones(3))
    assert not reached


def test_compiled_with_the_operator_in_the_graph() -> None:
    seen = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    op, call, arguments, _ = calls()["pcgrad"]
    compiled = torch.compile(lambda *args: call(*args), fullgraph=True, backend=backend)
    assert torch.equal(compiled(*arguments), op(*arguments))
    assert seen == [op]


def test_autocast_rounds_nothing() -> None:
    grads = gradients(3, torch.float32, 0, "cpu")
    expected = gramian_tensors(grads, SEGMENTS, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(direct.gramian_tensors(grads, SEGMENTS, 2), expected)


@needs_gpu
@each_call
def test_a_direct_call_on_the_device(name: str) -> None:
    results = []
    for which in (0, 1):
        call = calls("cuda")[name]
        result = call[which](*call[2])
        results.append([*returned(result), *call[3]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

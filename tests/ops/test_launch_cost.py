"""Two things that keep a step cheap on the host and change no result: cached launches and tables of addresses.

Times are not asserted, because a busy machine takes long for anything.
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
from torch import Tensor

pytest.importorskip("triton", reason="no Triton on this platform")

from gradkern.kernels import launch
from gradkern.ops.arguments import TaskGrads
from gradkern.ops.triton import address_tables
from gradkern.ops.triton.combine import combine_tensors
from gradkern.ops.triton.entries import gather
from gradkern.ops.triton.gramian import gramian_tensors
from gradkern.ops.triton.methods import pcgrad

ROOT = Path(__file__).parents[2]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")


# Cached launches


def test_cached_launches_are_tritons_own() -> None:
    """The kernels are built in a process of its own, because this one may have told Triton to interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "tests/launches.py"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]


def task_grads(T: int, dtype: torch.dtype, pad: int) -> TaskGrads:
    """Return gradients of five parameters on a GPU, each ``pad`` numbers behind a boundary of 16 bytes; one missing."""
    grads: list[Tensor | None] = [
        torch.randn(pad + size, device="cuda").to(dtype)[pad:] for _ in range(T) for size in (5000, 1, 4096, 77, 9000)
    ]
    grads[2] = None
    return TaskGrads(grads, [0, 1, 0, 1, 0], 2)


def results(rows: TaskGrads) -> list[Tensor]:
    """Return memory for the combination of the gradients."""
    return [torch.full_like(g, torch.nan) for g in rows.grads[5:10] if g is not None]


def step(T: int, dtype: torch.dtype, pad: int) -> list[Tensor]:
    """Return everything that the Triton back end computes in a step, from numbers that the arguments determine."""
    torch.manual_seed(1)
    rows = task_grads(T, dtype, pad)
    M = gramian_tensors(rows)
    C = pcgrad(M, torch.rand(2, T, T, device="cuda"), "all")
    out = results(rows)
    combine_tensors(rows, C.sum(1), out)
    X = gather(rows.grads, [len(g) for g in out], torch.tensor([3, 5000, 9097, 18000], device="cuda"))
    return [M, C, *out, X]


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cached_launches_give_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Aligned tensors come first or last, and each step is compared with one in which no launch was cached."""
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
    """A queue of work that is done only when told so, like the work of a device far behind the host."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []
        self.n_copies = 0

    def work(self, n: int | None = None) -> None:
        """Do the first ``n`` things that wait, or all."""
        for do in self.waiting[:n]:
            do()
        self.waiting = self.waiting[len(self.waiting) if n is None else n :]


class Event:
    """An event that is done when the stream gets there, and also before it was ever recorded, like CUDA's."""

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
    """A device with streams of our own, as ``address_tables`` sees it through PyTorch and CUDA."""

    name = torch.device("cuda", 0)

    def __init__(self) -> None:
        self.stream = Stream()
        self.n_stagings = 0
        self.capturing = False

    def new_staging(self, size: int) -> Any:
        self.n_stagings += 1
        numbers = np.full(size, -2)
        return address_tables._Staging(Pinned(numbers, self), numbers, Event())

    def table(self, addresses: Sequence[int]) -> Tensor:
        rows = address_tables.table_rows(tuple(addresses), 1, torch.float32, self.name)
        assert (rows.count, rows.stride, rows.table) == (len(addresses), 1, True)
        return rows.source


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    device = Device()
    monkeypatch.setattr(address_tables, "_rings", type(address_tables._rings)(address_tables._rings.default_factory))
    monkeypatch.setattr(address_tables, "_new_staging", device.new_staging)
    monkeypatch.setattr(address_tables, "capturing", lambda given: device.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda given: device.stream)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: id(device.stream), raising=False)
    address_tables._copied.cache_clear()
    yield device
    address_tables._copied.cache_clear()


def test_a_step_copies_each_table_once(simulated: Device) -> None:
    """A step has two tables: of the rows, for Gramian and combination, and of the outputs. The next copies none."""
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


def test_more_tables_than_the_cache_holds_are_staged_again(simulated: Device) -> None:
    """A table that was pushed out is copied anew, into memory that an earlier copy has left."""
    for n_copies in (1, 2):
        for i in range(address_tables.TABLES + 1):
            table = simulated.table([i])
            simulated.stream.work()
            assert table.tolist() == [i]
        assert simulated.stream.n_copies == n_copies * (address_tables.TABLES + 1)
    assert simulated.n_stagings == 1


def test_staging_memory_is_reused_only_when_it_has_been_copied_from(simulated: Device) -> None:
    """Each table ends up with its own addresses, however far the device is behind, and the host never waits."""
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
    kept, pinned = [], Pinned(np.array([1, 2, 3]), simulated)
    monkeypatch.setattr(address_tables, "keep", kept.append)
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
    rows = task_grads(3, torch.float32, 0)
    out = results(rows)
    w = torch.ones(2, 3, device="cuda")
    address_tables._copied.cache_clear()
    for n_copies in (2, 2):
        gramian_tensors(rows)
        combine_tensors(rows, w, out)
        assert address_tables._copied.cache_info().misses == n_copies
    with torch.cuda.stream(torch.cuda.Stream()):
        gramian_tensors(rows)
    assert address_tables._copied.cache_info().misses == 3


@needs_gpu
def test_tables_are_right_with_the_device_far_behind() -> None:
    X, w = torch.arange(40000.0, device="cuda"), torch.ones(1, 30, device="cuda")
    out = [torch.empty(1, device="cuda") for _ in range(300)]

    def combine_all() -> None:
        for k, o in enumerate(out):
            combine_tensors(TaskGrads(X[k : k + 30].split(1), [0], 1), w, [o])

    combine_all()  # compiles
    torch._foreach_zero_(out)
    address_tables._copied.cache_clear()  # or no table would be staged: the cache holds all of them
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # cycles: some 0.5 s, longer than the host takes for all of the following
    awake = torch.cuda.Event()
    awake.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        combine_all()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not awake.query()  # the device was behind until here
    assert address_tables._copied.cache_info().misses == 2 * len(out)  # of rows and of outputs
    # Of small whole numbers float32 sums are exact.
    assert torch.cat(out).tolist() == [sum(range(k, k + 30)) for k in range(300)]


@needs_gpu
def test_a_graph_reads_its_own_table_at_each_replay() -> None:
    rows = task_grads(3, torch.float32, 1)
    expected = gramian_tensors(rows)
    before = address_tables._copied.cache_info()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        M = gramian_tensors(rows)
    assert address_tables._copied.cache_info() == before
    address_tables._copied.cache_clear()
    for _ in range(2 * address_tables.TABLES):
        gramian_tensors(task_grads(3, torch.float32, 1))
    for _ in range(2):
        M.fill_(torch.nan)
        graph.replay()
        assert torch.equal(M, expected)

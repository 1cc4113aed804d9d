"""Tests of cached launches against Triton's own dispatch. A driver launches nothing and records its arguments.

The kernels are compiled, so this must run without TRITON_INTERPRET: ``test_launch_cost.py`` starts it in a process of
its own, as ``pytest --noconftest tests/launches.py``.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton import knobs

from gradkern.kernels import launch, pcgrad
from gradkern.kernels.launch import Launch
from gradkern.tuning.compiling import compiling
from tests import aot

Handed = tuple[Any, ...]
"""The arguments of a launch: grid (3), stream, function, packed metadata, launch metadata, enter hook, exit hook; then
the kernel's own."""
STREAM, FUNCTION, METADATA, ENTER = 3, 4, 6, 7
FIRST_ARGUMENT = 9
CPU = torch.device("cpu")


class Driver(aot.Driver):
    """The part of a Triton driver that compiling and launching need."""

    device = 0

    def __init__(self) -> None:
        super().__init__(aot.TARGETS["sm_90"])
        self.handed: list[Handed] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 1 << 20},
            load_binary=lambda name, binary, shared, device: (object(), object(), 0, 0, 1024),
        )

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 1000 + device

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Return a function that launches one kernel. Like the real one it calls the enter hook first."""

        def run(*handed: Any) -> None:
            handed[ENTER](handed[METADATA])
            self.handed.append(handed)

        return run


DRIVER = Driver()
triton.runtime.driver.set_active(DRIVER)


@pytest.fixture(autouse=True)
def _nothing_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_compiled", {})


def handed_by_us(given: Launch, device: torch.device = CPU) -> Handed:
    DRIVER.handed.clear()
    given.run(device)
    (handed,) = DRIVER.handed
    return handed


def handed_by_triton(given: Launch) -> Handed:
    DRIVER.handed.clear()
    given.kernel[given.grid](**given.arguments, num_warps=given.threads // 32, enable_fp_fusion=given.fp_fusion)
    (handed,) = DRIVER.handed
    return handed


def cached(given: Launch, device: torch.device = CPU) -> Handed:
    """Return the arguments of a launch that bypasses Triton's dispatch."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("not cached")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(triton.JITFunction, "run", refuse)
        return handed_by_us(given, device)


def assert_same(ours: Handed, theirs: Handed) -> None:
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if i == METADATA:
            a, b = a.data, b.data
        assert a is b or (not isinstance(a, Tensor) and a == b), (i, a, b)


def fullest_launches() -> dict[str, Launch]:
    """Return for each kernel the launch that leaves the fewest arguments out."""
    found: dict[str, Launch] = {}
    for case in aot.cases(DRIVER.target):
        name = case.launch.kernel.__name__
        if name not in found or n_left_out(case.launch) < n_left_out(found[name]):
            found[name] = case.launch
    return found


def n_left_out(given: Launch) -> int:
    return sum(value is None for value in given.arguments.values())


def variants(given: Launch) -> Iterator[Launch]:
    """Yield the launch with one argument at a time changed to a value that Triton specializes on by default."""
    for parameter in given.kernel.params:
        if parameter.is_constexpr:
            continue
        value = given.arguments[parameter.name]
        if isinstance(value, Tensor):
            buffer = torch.zeros(value.numel() + 16, dtype=value.dtype)
            others: list[Any] = [buffer[(-buffer.data_ptr() // value.itemsize) % 16 :][shift:] for shift in (0, 1)]
            assert [other.data_ptr() % 16 == 0 for other in others] == [True, False]
        elif isinstance(value, int):
            others = [1, 3, 16, 1 << 30, *([1 << 40, 0] if parameter.annotation_type == "i64" else [])]
        else:
            others = [type(value)(other) for other in (0, 1, 16)]
        for other in others:
            yield given._replace(arguments={**given.arguments, parameter.name: other})


@pytest.mark.parametrize("name", fullest_launches())
def test_a_cached_launch_is_tritons_own_whatever_the_arguments(name: str) -> None:
    given = fullest_launches()[name]
    assert n_left_out(given) == 0
    first = handed_by_us(given)
    assert_same(first, handed_by_triton(given))
    assert first[:FIRST_ARGUMENT][STREAM] == 1000
    for variant in [given, *variants(given)]:
        ours = cached(variant)
        assert_same(ours, handed_by_triton(variant))
        assert ours[FUNCTION] is first[FUNCTION]


def different_launches() -> Iterator[Launch]:
    """Return launches that need different binaries: other T, dtypes of rows or of one argument, threads, masks."""
    all_cases = list(aot.cases(DRIVER.target))
    wanted = [
        ("gramian", "fp32", "T=1"),
        ("gramian", "fp32", "T=3"),
        ("gramian", "bf16", "T=3"),
        ("combine", "fp32", "any T"),
        ("combine", "fp32", "any T, block 1"),
        ("combine", "fp32", "any T, block 128"),
    ]
    for key in wanted:
        yield next(case.launch for case in reversed(all_cases) if case[:3] == key)
    M = torch.zeros(1, 3, 3)
    for order_keys in (M, M.double()):
        yield pcgrad.pcgrad(M, order_keys, "all", M)
    yield pcgrad.pcgrad(M, M, "all", M)._replace(threads=64)


def test_what_differs_in_its_binary_is_told_apart() -> None:
    launches = list(different_launches())
    functions = [handed_by_us(given)[FUNCTION] for given in launches]
    assert len(set(map(id, functions))) == len(launches)
    for given in launches:
        assert_same(cached(given), handed_by_triton(given))


def test_each_device_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    M = torch.zeros(1, 3, 3)
    given = pcgrad.pcgrad(M, M, "all", M)
    handed_by_us(given)
    other = torch.device("cpu", 1)
    monkeypatch.setattr(DRIVER, "device", 1)
    on_other = handed_by_us(given, other)
    assert_same(on_other, handed_by_triton(given))
    assert_same(cached(given, other), on_other)
    monkeypatch.setattr(DRIVER, "device", 0)
    assert cached(given)[FUNCTION] is not on_other[FUNCTION]


def test_launch_hooks_hear_of_cached_launches() -> None:
    M = torch.zeros(1, 3, 3)
    given = pcgrad.pcgrad(M, M, "all", M)
    handed_by_us(given)
    heard = []

    def hook(metadata: Any) -> None:
        heard.append(metadata.get())

    knobs.runtime.launch_enter_hook.add(hook)
    cached(given)
    knobs.runtime.launch_enter_hook.remove(hook)
    cached(given)
    assert [told["name"] for told in heard] == ["pcgrad_kernel"]
    assert heard[0]["stream"] == 1000


def test_kernels_compiled_ahead_are_launched_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """``gradkern tune`` compiles in threads first, and launches nothing meanwhile."""
    M = torch.zeros(1, 3, 3)
    given = pcgrad.pcgrad(M, M, "all", M)._replace(fp_fusion=True)  # no other test has compiled it
    DRIVER.handed.clear()
    with compiling():
        given.run(CPU)
        given.run(CPU)
        given._replace(grid=(0,)).run(CPU)
    assert not DRIVER.handed
    assert not launch._compiled

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("not compiled")

    monkeypatch.setattr(triton.JITFunction, "_do_compile", refuse, raising=False)
    assert_same(handed_by_us(given), handed_by_triton(given))


def test_a_kernel_that_does_not_compile_raises_when_it_is_launched() -> None:
    right = next(case.launch for case in aot.cases(DRIVER.target) if case.kernel == "combine")
    wrong = right._replace(arguments=right.arguments | {"BLOCK": 96})
    with compiling():
        wrong.run(CPU)
    with pytest.raises(triton.CompilationError):
        wrong.run(CPU)


def test_an_empty_grid_is_no_launch() -> None:
    given = next(different_launches())
    given._replace(grid=(0,)).run(CPU)
    given._replace(grid=(3, 0)).run(CPU)
    assert not launch._compiled

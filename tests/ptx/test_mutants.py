"""What orders the programs of the one launch is taken away, piece by piece, and each time the emulator notices.

A mutant is the PTX of the kernel with something missing. It is caught if a run traps, or gives other bits than one
program alone. So the emulator would notice if the kernel lacked it.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.ptx import option

if not option.wanted():
    pytest.skip("Triton interprets kernels here; with --ptx it compiles them", allow_module_level=True)
if reason := option.why_not():
    pytest.skip(reason, allow_module_level=True)

from gradkern.kernels import finish_piece
from gradkern.ops.layout import TILE
from gradkern.ops.one_launch import work_list, workspace
from tests.ops.one_launch.test_one_launch import Problem, assert_same, everything, groups_of_two
from tests.ptx.core_library import Trap
from tests.ptx.machine import Machine, programs_at_once, serving

__all__ = ["groups_of_two"]

MOST_RUNS = 20
"""The order of programs differs from run to run, and not every order shows what is missing."""


def order(kind: str, instead: str) -> Callable[[str], str]:
    """Return a mutation that changes the memory order of atomics, also of those that the compiler makes loads."""
    return lambda ptx: re.sub(rf"((?:atom|ld)\.global\.gpu)\.{kind}\b", rf"\1.{instead}", ptx)


def no_barrier_before(opcode: str) -> Callable[[str], str]:
    """Return a mutation that leaves out the barriers before each instruction of a kind: back to the last access.

    There may be two: some versions of Triton put one of their own before an atomic.
    """

    def mutate(ptx: str) -> str:
        lines = ptx.split("\n")
        for i in [i for i, line in enumerate(lines) if opcode in line]:
            for k in range(i - 1, 0, -1):
                if re.search(r"\b(ld|st|atom)\.(global|shared)|\bbra\b|\$L__BB", lines[k]):
                    break
                if "bar.sync" in lines[k]:
                    lines[k] = ""
        return "\n".join(lines)

    return mutate


def no_barrier_before_M(ptx: str) -> str:
    """Leave out the barrier between the stores of M and the method's loads, found by its line in the source."""
    source = Path(finish_piece.__file__)
    (line,) = (n for n, text in enumerate(source.read_text().splitlines(), 1) if "tl.debug_barrier()" in text)
    file = re.search(rf'\.file\s+(\d+) "[^"]*{source.name}"', ptx)
    assert file is not None
    return re.sub(rf"(\.loc\s+{file[1]} {line} [^;]*?)bar\.sync\s+0;", r"\1", ptx)


MUTATIONS = {
    "counters in no order": order("acq_rel", "relaxed"),
    "counters that do not acquire": order("acq_rel", "release"),
    "counters that do not release": order("acq_rel", "acquire"),
    "flags that do not release": order("release", "relaxed"),
    "flags that nobody acquires": order("acquire", "relaxed"),
    "no barrier before counters": no_barrier_before("atom.global.gpu.acq_rel"),
    "no barrier before flags": no_barrier_before("atom.global.gpu.release"),
    "no barrier before M": no_barrier_before_M,
}


@pytest.fixture
def given(groups_of_two: None, monkeypatch: pytest.MonkeyPatch) -> Problem:
    """Give a surgery of many small groups, whose combinations come close behind their dot products."""
    monkeypatch.setattr(work_list, "LAG", {4: 1})
    monkeypatch.setattr(workspace, "_of_stream", {})
    numels = [300, 5, 2 * TILE + 7, 40, 1, 700, 33]
    return Problem(2, torch.float32, numels, [0, 1, 2, 3, 4, 5, -1], 7, missing=False)


@pytest.fixture
def expected(given: Problem) -> Iterator[list[torch.Tensor]]:
    """Give what one program alone makes of it."""
    with programs_at_once(1):
        yield everything(given)


@pytest.mark.parametrize("what", MUTATIONS)
def test_a_mutant_is_caught(what: str, given: Problem, expected: list[torch.Tensor]) -> None:
    changed = []

    def mutate(ptx: str) -> str:
        mutant = MUTATIONS[what](ptx)
        changed.append(mutant != ptx)
        return mutant

    caught = False
    with serving(Machine(option.arch(), mutate)), programs_at_once(5):
        for _ in range(MOST_RUNS):
            workspace._of_stream.clear()
            try:
                assert_same(everything(given), expected)
            except (Trap, AssertionError):
                caught = True
                break
    assert changed == [True]
    assert caught


def test_the_kernel_itself_passes(given: Problem, expected: list[torch.Tensor]) -> None:
    with serving(Machine(option.arch())), programs_at_once(5):
        for _ in range(MOST_RUNS):
            assert_same(everything(given), expected)

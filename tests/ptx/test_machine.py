"""Launches on the emulator: arguments as bits, the memory that a kernel may access, and what is counted."""

import gc

import pytest
import torch

from tests.ptx import option, tensors

if reason := option.why_not():
    pytest.skip(reason, allow_module_level=True)

from gradkern.kernels import reduce
from tests.ptx.core_library import Trap
from tests.ptx.machine import Machine, bits, serving

compiled = pytest.mark.skipif(not option.wanted(), reason="Triton interprets kernels here; with --ptx it compiles them")


def known(begin: int) -> bool:
    return any(a <= begin < b for a, b in tensors.storages([]))


@pytest.mark.parametrize("many", [0, 1 << 62])
def test_the_memory_of_tensors_that_are_alive(many: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not objects are set aside, and a view keeps the whole of its storage."""
    monkeypatch.setattr(tensors, "MANY", many)
    held = [torch.zeros(1000)[500:]]
    begin = held[0].untyped_storage().data_ptr()
    assert known(begin)
    assert known(begin + 3999)
    held.clear()
    gc.collect()
    assert not known(begin)


def test_arguments_as_bits() -> None:
    J = torch.zeros(3)
    assert bits(J, "u64") == J.data_ptr()
    assert bits(-1, "u32") == 0xFFFFFFFF
    assert bits(-2, "u64") == (1 << 64) - 2
    assert bits(1.0, "f32") == 0x3F800000
    assert bits(-2.0, "f64") == 0xC000000000000000


@compiled
def test_a_launch_may_access_no_other_memory() -> None:
    """The bounds say that there are more partial sums than the tensor has."""
    partials, M = torch.ones(2, 3), torch.empty(1, 2, 2)
    machine = Machine(option.arch())
    with serving(machine):
        reduce.reduce(partials, torch.tensor([0, 2]), M).run(M.device)
        assert M.tolist() == [[[2, 2], [2, 2]]]
        assert machine.ran["reduce_kernel"].launches == 1
        with pytest.raises(Trap, match="reduce_kernel: out of range: load of 4 bytes"):
            reduce.reduce(partials, torch.tensor([0, 1000]), M).run(M.device)


@compiled
def test_an_empty_grid_is_no_launch() -> None:
    machine = Machine(option.arch())
    with serving(machine):
        reduce.reduce(torch.empty(0, 1), torch.tensor([0]), torch.empty(0, 1, 1)).run(torch.device("cpu"))
    assert machine.ran == {}

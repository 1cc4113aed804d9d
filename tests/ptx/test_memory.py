"""Loads, stores, atomics and copies of one program: what they move, and what is refused."""

import re

import numpy as np
import pytest

from tests.ptx import build
from tests.ptx.core_library import Trap
from tests.ptx.instructions import GLOBAL_MEMORY, SHARED_MEMORY, spellings
from tests.ptx.snippets import DTYPES, Array, run

if reason := build.why_not():
    pytest.skip(reason, allow_module_level=True)

NUMBERS = np.random.default_rng(0).integers(0, 256, 32 * 16, np.uint8)


def opcodes(prefix: str) -> list[str]:
    return [o for row in GLOBAL_MEMORY + SHARED_MEMORY for o in spellings(row) if o.startswith(prefix)]


class Vector:
    """The registers that an opcode loads or stores, by 32 threads side by side."""

    def __init__(self, opcode: str) -> None:
        width = re.search(r"\.v([24])\.", opcode)
        self.n = int(width[1]) if width else 1
        self.kind = "b" + re.sub(r".*\.[bsu]", "", opcode)
        self.element = DTYPES[self.kind].itemsize
        self.size = self.n * self.element
        braces = self.n > 1 or ("global" in opcode and "gpu" not in opcode)
        self.registers = ", ".join(f"%x{i}" for i in range(self.n))
        if braces:
            self.registers = f"{{ {self.registers} }}"
        self.policy = ", %policy" if "cache_hint" in opcode else ""

    def one_by_one(self, template: str) -> str:
        return "".join(template.format(kind=self.kind, i=i, at=i * self.element) for i in range(self.n))

    def copied(self, body: str, weak: bool = False) -> Array:
        """Return the bytes that statements copy: a thread's begin at ``%from`` and go to ``%to``."""
        out = np.zeros(32 * self.size, np.uint8)
        places = (
            f"mad.wide.u32 %from, %t, {self.size}, %a0; mad.wide.u32 %to, %t, {self.size}, %a1;"
            f"mul.lo.u32 %shared, %t, {self.size}; createpolicy.fractional.L2::evict_first.b64 %policy, 1.0;"
        )
        run(places + body, [NUMBERS, out], weak=weak, shared=32 * self.size)
        return out


LOAD, STORE = "ld.global.{kind} {{ %x{i} }}, [ %from + {at} ];", "st.global.{kind} [ %to + {at} ], {{ %x{i} }};"
LOAD_SHARED, STORE_SHARED = "ld.shared.{kind} %x{i}, [ %shared + {at} ];", "st.shared.{kind} [ %shared + {at} ], %x{i};"


@pytest.mark.parametrize("weak", [False, True])
@pytest.mark.parametrize("opcode", opcodes("ld.global"))
def test_global_loads(opcode: str, weak: bool) -> None:
    of = Vector(opcode)
    out = of.copied(f"{opcode} {of.registers}, [ %from + 0 ]{of.policy};" + of.one_by_one(STORE), weak)
    np.testing.assert_array_equal(out, NUMBERS[: len(out)])


@pytest.mark.parametrize("weak", [False, True])
@pytest.mark.parametrize("opcode", opcodes("st.global"))
def test_global_stores(opcode: str, weak: bool) -> None:
    of = Vector(opcode)
    out = of.copied(of.one_by_one(LOAD) + f"{opcode} [ %to + 0 ], {of.registers}{of.policy};", weak)
    np.testing.assert_array_equal(out, NUMBERS[: len(out)])


@pytest.mark.parametrize("opcode", [o for o in opcodes("ld.shared") if "s32" not in o])
def test_shared_loads(opcode: str) -> None:
    """A lane loads what its neighbour has stored."""
    of = Vector(opcode)
    neighbour = f"xor.b32 %shared, %shared, {of.size};"
    load = f"{opcode} {of.registers}, [ %shared + 0 ];"
    out = of.copied(of.one_by_one(LOAD) + of.one_by_one(STORE_SHARED) + neighbour + load + of.one_by_one(STORE))
    swapped = NUMBERS[: len(out)].reshape(16, 2, of.size)[:, ::-1]
    np.testing.assert_array_equal(out, swapped.ravel())


@pytest.mark.parametrize("opcode", opcodes("st.shared"))
def test_shared_stores(opcode: str) -> None:
    of = Vector(opcode)
    store = f"{opcode} [ %shared + 0 ], {of.registers};"
    out = of.copied(of.one_by_one(LOAD) + store + of.one_by_one(LOAD_SHARED) + of.one_by_one(STORE))
    np.testing.assert_array_equal(out, NUMBERS[: len(out)])


def test_a_load_that_widens_by_the_sign() -> None:
    """``ld.shared.s32`` into a register of 64 bits."""
    out = np.zeros(32, np.int64)
    run(
        "sub.s32 %x, 7, %t; mul.lo.u32 %s, %t, 4; st.shared.b32 [%s], %x; ld.shared.s32 %y, [%s];"
        "mad.wide.u32 %at, %t, 8, %a0; st.global.b64 [%at], %y;",
        [out],
        shared=128,
    )
    assert out.tolist() == [7 - t for t in range(32)]


@pytest.mark.parametrize("opcode", opcodes("atom."))
def test_atomics(opcode: str) -> None:
    """Lanes of several programs add to one number, or exchange it: each sees another number before."""
    kind = opcode.rpartition(".")[2]
    size, programs = DTYPES[kind].itemsize, 3
    number = np.array([5], DTYPES[kind])
    before = np.zeros(32 * programs, DTYPES[kind])
    run(
        f"mov.u32 %p, %ctaid.x; mad.lo.u32 %i, %p, 32, %t; add.u32 %mine, %i, 100; cvt.u64.u32 %wide, %mine;"
        f"{opcode} %x, [ %a0 + 0 ], {'%wide' if size == 8 else '%mine'};"
        f"mad.wide.u32 %at, %i, {size}, %a1; st.global.b{8 * size} [%at], %x;",
        [number, before],
        grid=programs,
        weak=True,
    )
    given = 100 + np.arange(32 * programs)
    if ".add." in opcode:
        steps = np.diff(np.sort([*before, *number]))
        np.testing.assert_array_equal(np.sort(steps), given)  # the numbers seen differ by what each lane has added
        assert number[0] == 5 + given.sum()
    else:
        assert sorted([*before, *number]) == [5, *given]


@pytest.mark.parametrize("opcode", opcodes("red."))
def test_atomics_that_tell_nothing(opcode: str) -> None:
    kind = opcode.rpartition(".")[2]
    number = np.array([5], DTYPES[kind])
    operand = "%wide" if kind == "u64" else "%t"
    run(f"cvt.u64.u32 %wide, %t; {opcode} [ %a0 + 0 ], {operand};", [number], grid=3, weak=True, ordered=True)
    assert number[0] == 5 + 3 * sum(range(32))


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("through", ["ca", "cg"])
def test_asynchronous_copies(through: str, size: int) -> None:
    """Odd threads copy zeros. ``cp.async.ca.shared.global`` and ``cp.async.cg.shared.global`` differ in caching."""
    of = Vector(f".v{max(1, size // 4)}.b32" if size > 4 else ".b32")
    copy = f"cp.async.{through}.shared.global [ %shared + 0 ], [ %from + 0 ], {size:#x}, %given;"
    odd = f"and.b32 %odd, %t, 1; setp.eq.b32 %even, %odd, 0; selp.b32 %given, {size}, 0, %even;"
    wait = "cp.async.commit_group; cp.async.wait_group 0;"
    out = of.copied(odd + copy + wait + of.one_by_one(LOAD_SHARED) + of.one_by_one(STORE)).reshape(32, size)
    expected = NUMBERS[: 32 * size].reshape(32, size).copy()
    expected[1::2] = 0
    np.testing.assert_array_equal(out, expected)


COPY = "cp.async.ca.shared.global [ %s + 0 ], [ %from + 0 ], 0x4, 4; cp.async.commit_group;"
COPIES = "mul.lo.u32 %s, %t, 4; mad.wide.u32 %from, %t, 4, %a0;" + COPY + "add.u32 %s, %s, 512;" + COPY
REFUSED = {
    "a copy's bytes before the wait": (COPIES + "ld.shared.b32 %x, [%s];", "has not been waited for"),
    "the last group's bytes, when the one before has landed": (
        COPIES + "cp.async.wait_group 1; ld.shared.b32 %x, [%s];",
        "has not been waited for",
    ),
    "another warp's copy without a barrier": (
        COPIES + "cp.async.wait_group 0; xor.b32 %s, %s, 128; ld.shared.b32 %x, [%s];",
        "(race in shared memory|has not been waited for)",  # as the warps go
    ),
    "another warp's store without a barrier": (
        "mul.lo.u32 %s, %t, 4; st.shared.b32 [%s], %t; xor.b32 %s, %s, 128; ld.shared.b32 %x, [%s];",
        "race in shared memory",
    ),
    "a store over what another warp loads": (
        "mul.lo.u32 %s, %t, 4; st.shared.b32 [%s], %t; bar.sync 0; ld.shared.b32 %x, [%s]; xor.b32 %s, %s, 128;"
        "st.shared.b32 [%s], 7;",
        "race in shared memory",
    ),
    "shared memory's end": ("st.shared.b32 [1024], %t;", "out of range: shared memory, 4 bytes at 1024 of 1024"),
    "shared memory between its words": ("st.shared.b32 [2], %t;", "misaligned: shared memory"),
    "an array's end": ("st.global.b32 [%a0 + 512], %t;", "out of range: store of 4 bytes"),
    "before an array": ("sub.s64 %p, %a0, 4; ld.global.b32 %x, [%p];", "out of range: load of 4 bytes"),
    "a vector between its places": ("ld.global.v2.b32 {%x, %y}, [%a0 + 4];", "misaligned: load of 8 bytes"),
    "another warp's store to global memory": (
        "mad.wide.u32 %p, %t, 4, %a0; st.global.b32 [%p], 7; xor.b32 %u, %t, 32; mad.wide.u32 %p, %u, 4, %a0;"
        "ld.global.b32 %x, [%p];",
        "race in global memory",
    ),
    "a store to global memory over what another warp loads": (
        "mad.wide.u32 %p, %t, 4, %a0; ld.global.b32 %x, [%p]; xor.b32 %u, %t, 32; mad.wide.u32 %p, %u, 4, %a0;"
        "st.global.b32 [%p], 7;",
        "race in global memory",
    ),
    "a value never written": ("add.u32 %x, %y, 1; st.global.b32 [%a0], %x;", "nobody has defined is stored"),
    "shared memory never written": (
        "ld.shared.b32 %x, [0]; st.global.b32 [%a0], %x;",
        "nobody has defined is stored",
    ),
    "an address never written": ("ld.global.b32 %x, [%y];", "nobody has defined is an address"),
    "a predicate never written": ("@%p bra $L; $L:", "nobody has defined is a predicate"),
}


@pytest.mark.parametrize("weak", [False, True])
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what: str, weak: bool) -> None:
    body, message = REFUSED[what]
    with pytest.raises(Trap, match=f"kernel: .*{message}.* line 5"):
        run(body, [np.zeros(128, np.int32)], threads=128, shared=1024, weak=weak)


ALLOWED = {
    "a barrier between a store and a load": (
        "mul.lo.u32 %s, %t, 4; st.shared.b32 [%s], %t; bar.sync 0; xor.b32 %s, %s, 128; ld.shared.b32 %x, [%s];"
        "mad.wide.u32 %p, %t, 4, %a0; st.global.b32 [%p], %x; bar.sync 0; xor.b32 %u, %t, 32;"
        "mad.wide.u32 %p, %u, 4, %a0; ld.global.b32 %x, [%p];"
    ),
    "all warps storing the same": "st.shared.b32 [0], 7; st.global.b32 [%a0], 7;",
    "an undefined value that is not chosen": "selp.b32 %x, %t, %y, 1; st.global.b32 [%a0], 7;",
    "an undefined half that is not used": (
        "cvt.u16.u32 %h, %t; mov.b32 %x, {%undefined, %h}; mov.b32 {_, %g}, %x; setp.eq.b16 %p, %g, 1; @%p bra $L; $L:"
    ),
    "an undefined predicate that a false one decides": "setp.ne.b32 %no, %t, %t; and.pred %q, %no, %p; @%q bra $L; $L:",
    "an undefined value in a lane that does not store": (
        "setp.eq.b32 %p, %t, 0; @%p mov.b32 %x, 7; @%p st.global.b32 [%a0], %x;"
    ),
}


@pytest.mark.parametrize("what", ALLOWED)
def test_what_is_allowed(what: str) -> None:
    run(ALLOWED[what], [np.zeros(128, np.int32)], threads=128, shared=1024)

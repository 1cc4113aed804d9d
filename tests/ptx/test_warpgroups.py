"""wgmma, the products of four warps on matrices in shared memory, against NumPy, for every way they may lie there."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from tests.ptx import build
from tests.ptx.core_library import Trap
from tests.ptx.snippets import Array, run
from tests.ptx.test_matrices import KINDS, matrix

if reason := build.why_not():
    pytest.skip(reason, allow_module_level=True)

ROWS, BYTES = 64, 32
SHARED = 32 * 1024
"""Two matrices, each in half of it."""
OPCODES = {
    "bf16": "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16",
    "f16": "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16",
    "tf32": "wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32",
}
CODES = {0: 0, 128: 1, 64: 2, 32: 3}


def swizzled(size: int, column: int) -> Callable[[int, int], int]:
    """Return where byte ``b`` of a row is, for rows of ``size`` bytes of which the matrix begins at ``column``.

    Eight rows are a block; in it 16-byte pieces change places by the row's number: in rows of 128 bytes piece c goes to
    c ^ row, in rows of 64 to c ^ row / 2, in rows of 32 to c ^ row / 4.
    """
    fold = 128 // size

    def place(row: int, b: int) -> int:
        piece, rest = divmod(column + b, 16)
        return row // 8 * 8 * size + row % 8 * size + (piece ^ row % 8 // fold) * 16 + rest

    return place


def unswizzled(row: int, b: int) -> int:
    """Return the same without a swizzle: 8 rows of 16 bytes are a block; blocks of one matrix go down, then right."""
    return (row // 8 + 8 * (b // 16)) * 128 + row % 8 * 16 + b % 16


def descriptor(start: int, size: int) -> int:
    """Return what describes a matrix at a place in shared memory."""
    leading, stride = (8 * 128, 128) if size == 0 else (16, 8 * size)
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | CODES[size] << 62


LAYOUTS = {
    "none": (0, 0),
    "32": (32, 0),
    "64": (64, 0),
    "64 further": (64, 32),
    "128": (128, 0),
    "128 further": (128, 96),
}


def laid_out(bits: Array, start: int, layout: str, shared: Array) -> int:
    """Put a matrix, a row (of A) or column (of B) after the other, into shared memory, and return its descriptor."""
    size, column = LAYOUTS[layout]
    place = unswizzled if size == 0 else swizzled(size, column)
    for row, b in product(range(ROWS), range(BYTES)):
        shared[start + place(row, b)] = bits.view(np.uint8)[row, b]
    return descriptor(start + column, size)


D = [f"%d{i}" for i in range(32)]
FILL = f"""
    mul.lo.u32 %s, %t, 16; mov.b32 %n, 0;
    $FILL:
    cvt.u64.u32 %o, %s; add.s64 %from, %a0, %o; ld.global.v4.b32 {{%x, %y, %z, %w}}, [%from];
    st.shared.v4.b32 [%s], {{%x, %y, %z, %w}};
    add.u32 %s, %s, 2048; setp.lt.u32 %more, %s, {SHARED}; @%more bra $FILL;
"""
OUT = "mad.wide.u32 %at, %t, 128, %a1;" + "".join(f"st.global.b32 [%at + {4 * i}], {{{d}}};" for i, d in enumerate(D))
ZERO = "".join(f"mov.b32 {d}, 0f3F800000;" for d in D)
"""Sums begin at 1, so that it shows whether they are added to."""
SEEN = "fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;"
WAIT = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"


def result(body: str, shared: Array, extra: Array) -> Array:
    """Return D (64, 64). Lane l of warp w has rows 16 w + l / 4 and 8 below, columns 8 j + 2 (l % 4) and the next."""
    out = np.zeros((128, 32), np.float32)
    run(FILL + ZERO + body + OUT, [shared, out, extra], threads=128, shared=SHARED)
    found = np.zeros((64, 64), np.float32)
    for thread, i in product(range(128), range(32)):
        warp, lane = divmod(thread, 32)
        found[16 * warp + lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2] = out[thread, i]
    return found


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_both_in_shared_memory(kind: str, layout: str, adds: bool) -> None:
    k = BYTES // np.dtype(KINDS[kind].bits).itemsize
    (A, A_bits), (B, B_bits) = matrix(kind, ROWS, k), matrix(kind, ROWS, k)  # B by its columns
    shared = np.zeros(SHARED, np.uint8)
    a, b = laid_out(A_bits, 0, layout, shared), laid_out(B_bits, SHARED // 2, layout, shared)
    wgmma = f"{OPCODES[kind]} {{{','.join(D)}}}, %da, %db, %adds, 1, 1, 0, 0;"
    describe = f"mov.b64 %da, {a}; mov.b64 %db, {b}; mov.pred %adds, {-1 if adds else 0};"
    found = result(describe + SEEN + wgmma + WAIT, shared, np.zeros(1))
    np.testing.assert_array_equal(found, A @ B.T + adds)


@pytest.mark.parametrize("kind", OPCODES)
def test_A_in_registers(kind: str) -> None:
    """Two products in turn, the second added to the first."""
    k = BYTES // np.dtype(KINDS[kind].bits).itemsize
    (A, A_bits), (B, B_bits) = matrix(kind, ROWS, k), matrix(kind, ROWS, k)
    shared = np.zeros(SHARED, np.uint8)
    b = laid_out(B_bits, 0, "128", shared)
    words = A_bits.view(np.uint32)  # (64, 8): of a row, 4 lanes have 2 registers each
    registers = np.zeros((128, 4), np.uint32)
    for thread, i in product(range(128), range(4)):
        warp, lane = divmod(thread, 32)
        registers[thread, i] = words[16 * warp + lane // 4 + 8 * (i % 2), lane % 4 + 4 * (i // 2)]
    load = "mad.wide.u32 %ra, %t, 16, %a2; ld.global.v4.b32 {%r0, %r1, %r2, %r3}, [%ra];"
    last = "" if kind == "tf32" else ", 0"
    wgmma = f"{OPCODES[kind]} {{{','.join(D)}}}, {{%r0, %r1, %r2, %r3}}, %db, %adds, 1, 1{last};"
    describe = f"mov.b64 %db, {b}; mov.pred %adds, 0;"
    found = result(load + describe + SEEN + wgmma + "mov.pred %adds, -1;" + wgmma + WAIT, shared, registers)
    np.testing.assert_array_equal(found, 2 * A @ B.T)


PRODUCT = f"{OPCODES['bf16']} {{{','.join(D)}}}, %da, %da, %yes, 1, 1, 0, 0;"
DESCRIBE = f"mov.b64 %da, {descriptor(0, 128)}; mov.pred %yes, -1;"
REFUSED = {
    "sums before the wait": (SEEN + PRODUCT + "wgmma.commit_group.sync.aligned;", "nobody has defined is stored"),
    "the last group before its wait": (
        SEEN + PRODUCT + "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1;",
        "nobody has defined is stored",
    ),
    "no fence after stores": ("bar.sync 0;" + PRODUCT + WAIT, "no fence.proxy.async since"),
    "no barrier after other warps' stores": (SEEN.replace("bar.sync 0;", "") + PRODUCT + WAIT, "race|no fence"),
    "shared memory overwritten before the wait": (
        SEEN + PRODUCT + "wgmma.commit_group.sync.aligned; mul.lo.u32 %s, %t, 4; st.shared.b32 [%s], %t;"
        "wgmma.wait_group.sync.aligned 0;",
        "race|no fence",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what: str) -> None:
    body, message = REFUSED[what]
    with pytest.raises(Trap, match=message):
        result(DESCRIBE + body, np.zeros(SHARED, np.uint8), np.zeros(1))

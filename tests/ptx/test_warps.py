"""How lanes go: branches, calls, barriers, and exchanges within a warp."""

import numpy as np
import pytest

from tests.ptx import build
from tests.ptx.core_library import Trap
from tests.ptx.snippets import Array, run

if reason := build.why_not():
    pytest.skip(reason, allow_module_level=True)

RNG = np.random.default_rng(0)


def exchanged(body: str, values: Array, threads: int = 32) -> Array:
    """Return ``%d`` of each thread, an int32, when ``%x`` is its value."""
    out = np.zeros(threads, np.int32)
    start = "mad.wide.u32 %from, %t, 4, %a0; ld.global.b32 {%x}, [%from]; mad.wide.u32 %to, %t, 4, %a1;"
    run(start + body + "st.global.b32 [%to], %d;", [values.astype(np.int32), out], threads=threads, shared=1024)
    return out


VALUES = RNG.integers(-1000, 1000, 32)


@pytest.mark.parametrize("distance", [1, 2, 4, 8, 16, 31])
def test_a_butterfly(distance: int) -> None:
    out = exchanged(f"shfl.sync.bfly.b32 %d, %x, {distance}, 31, -1;", VALUES)
    assert out.tolist() == [VALUES[lane ^ distance] for lane in range(32)]


def test_a_shuffle_by_number() -> None:
    out = exchanged("mul.lo.u32 %i, %t, 7; and.b32 %i, %i, 31; shfl.sync.idx.b32 %d, %x, %i, 31, -1;", VALUES)
    assert out.tolist() == [VALUES[7 * lane % 32] for lane in range(32)]


@pytest.mark.parametrize("function", ["add", "min", "max"])
@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_reductions(function: str, kind: str) -> None:
    values = VALUES.astype(np.int32).view({"s32": np.int32, "u32": np.uint32}[kind])
    expected = {"add": np.add, "min": np.minimum, "max": np.maximum}[function].reduce(values, dtype=values.dtype)
    out = exchanged(f"mov.b32 %all, -1; redux.sync.{function}.{kind} %d, %x, %all;", VALUES)
    assert out.view(values.dtype).tolist() == [expected] * 32


def test_a_reduction_of_some_lanes() -> None:
    some = "setp.lt.s32 %p, %t, 5; mov.b32 %d, 7; @!%p bra $L; mov.b32 %m, 31; redux.sync.add.s32 %d, %x, %m; $L:"
    assert exchanged(some, VALUES).tolist() == [VALUES[:5].sum()] * 5 + [7] * 27


def test_loops_of_different_lengths() -> None:
    """Lanes part, and are together again for the shuffle: each has counted as far as its own number."""
    body = """
        mov.b32 %n, 0;
        $AGAIN:
        setp.ge.s32 %done, %n, %t;
        @%done bra $OUT;
        add.s32 %n, %n, 1;
        bra.uni $AGAIN;
        $OUT:
        bar.warp.sync -1;
        shfl.sync.bfly.b32 %d, %n, 1, 31, -1;
    """
    assert exchanged(body, VALUES).tolist() == [lane ^ 1 for lane in range(32)]


def test_a_predicate_and_its_opposite() -> None:
    body = "and.b32 %odd, %t, 1; setp.eq.b32 %p, %odd, 1; @%p mov.b32 %d, 1; @!%p mov.b32 %d, 2;"
    assert exchanged(body, VALUES).tolist() == [2, 1] * 16


def test_lanes_that_end_early() -> None:
    body = "mov.b32 %d, 5; setp.gt.u32 %p, %t, 3; @%p ret;"
    assert exchanged(body, VALUES).tolist() == [5] * 4 + [0] * 28


def test_a_barrier_orders_all_warps() -> None:
    """Each thread passes its number to the one opposite, through shared memory."""
    body = """
        mul.lo.u32 %s, %t, 4; st.shared.b32 [%s], %x; bar.sync 0;
        sub.u32 %s, 508, %s; ld.shared.b32 %d, [%s];
    """
    values = RNG.integers(0, 100, 128)
    assert exchanged(body, values, 128).tolist() == values[::-1].tolist()


def test_a_call() -> None:
    """A function is called twice, from a part of the lanes; it has registers and parameters of its own."""
    from tests.ptx.core_library import Settings
    from tests.ptx.program import Program

    text = """
    .func square(.param .b64 square_param_0, .param .b32 square_param_1);
    .visible .entry kernel(.param .u64 kernel_param_0) .reqntid 32
    {
        .reg .b32 %r<5>;
        ld.param.b64 %rd1, [kernel_param_0]; // where to
        mov.u32 %r1, %tid.x;
        mad.wide.u32 %rd2, %r1, 4, %rd1;
        setp.lt.u32 %p1, %r1, 9;
        @%p1 bra $CALL;
        ret;
    $CALL:
        { // callseq 0, 0
        .param .b64 param0;
        .param .b32 param1;
        st.param.b64 [param0], %rd2;
        st.param.b32 [param1], %r1;
        call.uni square, (param0, param1);
        } // callseq 0
        { .reg .b32 tmp; mov.b64 {tmp, %r2}, %rd2; }
        add.s64 %rd3, %rd2, 128;
        add.s32 %r3, %r1, 1;
        {
        st.param.b64 [param0], %rd3;
        st.param.b32 [param1], %r3;
        call square, (param0, param1);
        }
        ret;
    }
    .func square(.param .b64 square_param_0, .param .b32 square_param_1)
    {
        ld.param.b64 %rd1, [square_param_0];
        ld.param.b32 %r1, [square_param_1];
        mul.lo.s32 %r2, %r1, %r1;
        st.global.b32 [%rd1], %r2;
        ret;
    }
    """
    out = np.zeros(64, np.int32)
    begin = out.ctypes.data
    Program(text, 0).run(
        (1,), [begin], [(begin, begin + out.nbytes)], Settings(at_once=1, multiprocessors=1, turn=9, patience=1000)
    )
    lanes = np.arange(32)
    expected = np.where(lanes < 9, lanes**2, 0), np.where(lanes < 9, (lanes + 1) ** 2, 0)
    np.testing.assert_array_equal(out.reshape(2, 32), expected)


REFUSED = {
    "trap": ("trap;", "says trap"),
    "a barrier that some have left behind": ("setp.lt.u32 %p, %t, 32; @%p ret; bar.sync 0;", "deadlock"),
    "a barrier that half a warp has left behind": (
        "setp.lt.u32 %p, %t, 8; @%p bra $L; shfl.sync.bfly.b32 %d, %t, 1, 31, -1; ret; $L: bar.sync 0;",
        "deadlock",
    ),
    "a shuffle from a lane that is elsewhere": (
        "setp.lt.u32 %p, %t, 8; @!%p bra $L; shfl.sync.bfly.b32 %d, %t, 8, 31, 255; $L:",
        "a lane that takes no part",
    ),
    "a shuffle under a predicate": (
        "setp.lt.u32 %p, %t, 8; @%p shfl.sync.bfly.b32 %d, %t, 1, 31, -1;",
        "whole warp is predicated",
    ),
    "waiting for ever": ("$L: ld.global.cg.b32 %x, [%a0]; setp.eq.b32 %p, %x, 0; @%p bra $L;", "livelock"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what: str) -> None:
    body, message = REFUSED[what]
    with pytest.raises(Trap, match=message):
        run(body, [np.zeros(4, np.int32)], threads=64)

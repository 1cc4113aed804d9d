"""Short concurrent programs whose outcomes tell memory models apart.

What the emulator may show is shown by some of many orders of the programs, each drawn from a seed of its own; what it
must not show is shown by none.
"""

import numpy as np
import pytest

from tests.ptx import build
from tests.ptx.core_library import Trap
from tests.ptx.snippets import run

if reason := build.why_not():
    pytest.skip(reason, allow_module_level=True)

SEEDS = range(60)
ONE_THREAD = "mov.u32 %p, %ctaid.x; setp.ne.b32 %other, %t, 0; @%other ret; setp.eq.b32 %first, %p, 0;"
DATA, FLAG, COPY, SEEN = 0, 64, 128, 192
"""Where numbers are in the array, each in a cache line of its own."""


def at(place: int) -> str:
    return f"[%a0 + {4 * place}]"


def outcomes(body: str, weak: bool = True, grid: int = 2, threads: int = 32) -> set[tuple[int, int]]:
    """Return all pairs of ``SEEN`` numbers that programs of one thread each leave."""
    found = set()
    for seed in SEEDS:
        memory = np.zeros(320, np.int32)
        run(body, [memory], grid=grid, threads=threads, weak=weak, seed=seed)
        found.add((int(memory[SEEN]), int(memory[SEEN + 32])))
    return found


def message(stored: str, raised: str, seen: str, then: str = "") -> str:
    """Return programs of which the first stores 1 and raises a flag, and the second waits for the flag and loads.

    The second has loaded once before, so that its cache holds a 0.
    """
    return f"""
        {ONE_THREAD}
        mov.b32 %one, 1; mov.b32 %zero, 0;
        @%first bra $FIRST;
        ld.global.b32 %early, {at(DATA)};
        $WAIT:
        {seen.format(at(FLAG))}
        setp.eq.b32 %again, %x, 0;
        @%again bra $WAIT;
        {then}
        ld.global.b32 %late, {at(DATA)};
        st.global.b32 {at(SEEN)}, %late;
        ret;
        $FIRST:
        st.global.b32 {at(DATA)}, {stored};
        {raised.format(at(FLAG))}
    """


RAISE = "atom.global.gpu.{}.exch.b32 %x, {{}}, %one;"
WAIT = "atom.global.gpu.{}.add.u32 %x, {{}}, %zero;"


def test_a_message_arrives_by_release_and_acquire() -> None:
    for seen in (WAIT.format("acquire"), WAIT.format("acq_rel"), "ld.global.gpu.acquire.b32 %x, {};"):
        for raised in (RAISE.format("release"), RAISE.format("acq_rel")):
            assert outcomes(message("1", raised, seen)) == {(1, 0)}


def test_acquiring_once_after_relaxed_waiting_suffices() -> None:
    program = message("1", RAISE.format("release"), WAIT.format("relaxed"), WAIT.format("acquire").format(at(FLAG)))
    assert outcomes(program) == {(1, 0)}


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (RAISE.format("relaxed"), WAIT.format("acquire")),
        (RAISE.format("acquire"), WAIT.format("acquire")),
        (RAISE.format("release"), WAIT.format("relaxed")),
        (RAISE.format("release"), WAIT.format("release")),
        (RAISE.format("release"), "ld.global.gpu.relaxed.b32 %x, {};"),
        (RAISE.format("relaxed"), WAIT.format("relaxed")),
    ],
)
def test_a_message_may_be_lost_otherwise(raised: str, seen: str) -> None:
    assert outcomes(message("1", raised, seen)) == {(0, 0), (1, 0)}
    assert outcomes(message("1", raised, seen), weak=False) == {(1, 0)}


def test_loads_past_the_cache_see_what_is_released() -> None:
    program = message("1", RAISE.format("release"), WAIT.format("relaxed"))
    assert outcomes(program.replace("ld.global.b32 %late", "ld.global.cg.b32 %late")) == {(1, 0)}


ORDERED = "race between programs: nothing orders this load after another program's store"


@pytest.mark.parametrize("seed", range(5))
def test_what_nothing_orders_is_a_race_even_if_it_goes_well(seed: int) -> None:
    memory = np.zeros(320, np.int32)
    for raised in ("release", "acq_rel"):
        for seen in (WAIT.format("acquire"), "ld.global.gpu.acquire.b32 %x, {};"):
            memory[:] = 0
            run(late(message("1", RAISE.format(raised), seen)), [memory], grid=2, weak=True, ordered=True, seed=seed)
    for raised, seen in (
        ("relaxed", "acquire"),
        ("acquire", "acquire"),
        ("release", "relaxed"),
        ("release", "release"),
    ):
        memory[:] = 0
        with pytest.raises(Trap, match=ORDERED):
            run(late(message("1", RAISE.format(raised), WAIT.format(seen))), [memory], grid=2, ordered=True, seed=seed)


def late(program: str) -> str:
    """Leave out the load before the flag is seen, which nothing orders."""
    return program.replace(f"ld.global.b32 %early, {at(DATA)};", "")


BUFFERED = f"""
    {ONE_THREAD}
    selp.b32 %mine, {4 * DATA}, {4 * FLAG}, %first;
    selp.b32 %others, {4 * FLAG}, {4 * DATA}, %first;
    mad.wide.u32 %store, %mine, 1, %a0;
    mad.wide.u32 %load, %others, 1, %a0;
    mad.wide.u32 %to, %p, 128, %a0;
    st.global.b32 [%store], 1;
    ld.global.gpu.relaxed.b32 %x, [%load];
    st.global.b32 [%to + {4 * SEEN}], %x;
"""


def test_both_may_miss_the_others_store() -> None:
    """Each stores to a place of its own, then loads from the other's. One after another, one of them would see a 1."""
    assert (0, 0) in outcomes(BUFFERED)
    assert (0, 0) not in outcomes(BUFFERED, weak=False)


def test_stores_of_a_thread_arrive_out_of_order() -> None:
    program = f"""
        {ONE_THREAD}
        @%first bra $FIRST;
        $WAIT:
        ld.global.gpu.relaxed.b32 %x, {at(FLAG)};
        setp.eq.b32 %again, %x, 0;
        @%again bra $WAIT;
        ld.global.gpu.relaxed.b32 %late, {at(DATA)};
        st.global.b32 {at(SEEN)}, %late;
        ret;
        $FIRST:
        st.global.b32 {at(DATA)}, 1;
        st.global.b32 {at(FLAG)}, 1;
        mov.b32 %n, 0;
        $STAY:
        add.s32 %n, %n, 1; setp.lt.s32 %more, %n, 900; @%more bra $STAY;
    """
    assert outcomes(program) == {(0, 0), (1, 0)}
    assert outcomes(program, weak=False) == {(1, 0)}


def test_stores_to_one_place_arrive_in_order() -> None:
    stores = "".join(f"st.global.b32 {at(SEEN)}, {i};" for i in range(1, 6))
    assert outcomes(ONE_THREAD + stores, grid=1) == {(5, 0)}


def test_a_program_sees_its_own_stores() -> None:
    """Also beside a part of a line that another program stores to."""
    program = """
        mov.u32 %p, %ctaid.x;
        mad.lo.u32 %i, %t, 2, %p;
        mad.wide.u32 %at, %i, 4, %a0;
        ld.global.b32 %before, [%at];
        add.u32 %x, %i, 1;
        st.global.b32 [%at], %x;
        ld.global.b32 %y, [%at];
        ld.global.cg.b32 %z, [%at];
        setp.ne.b32 %wrong, %y, %x; @%wrong trap;
        setp.ne.b32 %wrong, %z, %x; @%wrong trap;
    """
    for seed in SEEDS:
        memory = np.zeros(64, np.int32)
        run(program, [memory], grid=2, weak=True, seed=seed)
        assert memory.tolist() == list(range(1, 65))


def relayed(barrier: str) -> str:
    """Return programs of which the first's thread 40 stores, and thread 0 raises the flag, a barrier between."""
    return f"""
        mov.u32 %p, %ctaid.x; setp.eq.b32 %first, %p, 0; setp.eq.b32 %leader, %t, 0; setp.eq.b32 %far, %t, 40;
        mov.b32 %one, 1; mov.b32 %zero, 0;
        @%first bra $FIRST;
        @!%leader ret;
        ld.global.b32 %early, {at(DATA)};
        $WAIT:
        atom.global.gpu.acquire.add.u32 %x, {at(FLAG)}, %zero;
        setp.eq.b32 %again, %x, 0;
        @%again bra $WAIT;
        ld.global.b32 %late, {at(DATA)};
        st.global.b32 {at(SEEN)}, %late;
        ret;
        $FIRST:
        @%far st.global.b32 {at(DATA)}, 1;
        {barrier}
        @%leader atom.global.gpu.release.exch.b32 %x, {at(FLAG)}, %one;
    """


def test_a_barrier_before_a_release_hands_other_threads_stores_over() -> None:
    assert outcomes(relayed("bar.sync 0;"), threads=64) == {(1, 0)}
    assert outcomes(relayed(""), threads=64) == {(0, 0), (1, 0)}


def test_another_threads_store_with_no_barrier_before_the_release_is_a_race() -> None:
    def go(barrier: str) -> None:
        run(late(relayed(barrier)), [np.zeros(320, np.int32)], grid=2, threads=64, weak=True, ordered=True)

    go("bar.sync 0;")
    with pytest.raises(Trap, match=ORDERED):
        go("")


@pytest.mark.parametrize(
    "second",
    ["st.global.b32 [%a0], 2;", "ld.global.b32 %x, [%a0];", "atom.global.gpu.relaxed.add.u32 %x, [%a0], %one;"],
)
def test_a_store_and_anything_beside_it_is_a_race(second: str) -> None:
    program = f"{ONE_THREAD} mov.b32 %one, 1; @%first st.global.b32 [%a0], 1; @%first ret; {second}"
    with pytest.raises(Trap, match="race between programs"):
        run(program, [np.zeros(4, np.int32)], grid=2, ordered=True)


@pytest.mark.parametrize("both", ["ld.global.b32 %x, [%a0];", "atom.global.gpu.relaxed.add.u32 %x, [%a0], %one;"])
def test_loads_beside_loads_and_atomics_beside_atomics_are_none(both: str) -> None:
    run(f"{ONE_THREAD} mov.b32 %one, 1; {both}", [np.zeros(4, np.int32)], grid=8, ordered=True)


def test_programs_that_wait_for_each_other_for_ever() -> None:
    program = f"""
        {ONE_THREAD}
        selp.b32 %mine, {4 * DATA}, {4 * FLAG}, %first; selp.b32 %others, {4 * FLAG}, {4 * DATA}, %first;
        mad.wide.u32 %raise, %mine, 1, %a0; mad.wide.u32 %wait, %others, 1, %a0;
        mov.b32 %one, 1; mov.b32 %zero, 0;
        $WAIT:
        atom.global.gpu.acquire.add.u32 %x, [%wait], %zero;
        setp.eq.b32 %again, %x, 0;
        @%again bra $WAIT;
        atom.global.gpu.release.exch.b32 %x, [%raise], %one;
    """
    with pytest.raises(Trap, match="livelock: memory has not changed for long"):
        run(program, [np.zeros(320, np.int32)], grid=2, weak=True)

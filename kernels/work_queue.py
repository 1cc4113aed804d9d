"""The queue by which the programs of one launch share work, and wait for each other, in device memory.

It consists of tickets, counters and flags. All are int32, zero before the launch and zero again after it, so that
nothing need be cleared between launches. One thread of a program acquires and releases them. A barrier before that
orders the other threads' stores; telling them the result brings a barrier after it, which orders their loads.

In the interpreter programs run one after another: the first draws every ticket, and no wait ever waits.
"""

import triton
import triton.language as tl

LINE = 32
"""Numbers of 128 bytes: a flag that many programs wait for does not share a cache line with others' counters."""

TICKET = tl.constexpr(0)
LEFT = tl.constexpr(LINE)
FOUND = tl.constexpr(2 * LINE)
COUNTERS = tl.constexpr(3 * LINE)
"""Places of the next ticket, of how many programs have left, of whether something was found, and of the counters."""


@triton.jit
def draw_ticket(p_shared):
    """The number of the next ticket."""
    return tl.atomic_add(p_shared + TICKET, 1, sem="relaxed")


@triton.jit
def is_last(p_counter, n):
    """Whether this is the last of ``n`` programs to come here; it sees all that the others have written."""
    tl.debug_barrier()
    return tl.atomic_add(p_counter, 1, sem="acq_rel") == n - 1


@triton.jit
def release(p_flag):
    """Raise a flag: a program that waits for it sees what this one has written."""
    tl.debug_barrier()
    tl.atomic_xchg(p_flag, 1, sem="release")


@triton.jit
def wait_for(p_flag):
    """Wait until the holder of a lower ticket has raised a flag."""
    # Acquiring empties the first cache of all programs beside this one, so it is done once there is something to see.
    # It is the condition of a loop, because an atomic whose result nobody uses may be left out.
    raised = 0
    while raised == 0:
        raised = tl.atomic_add(p_flag, 0, sem="relaxed")
    raised = 0
    while raised == 0:
        raised = tl.atomic_add(p_flag, 0, sem="acquire")


@triton.jit
def clear(p_shared, n):
    """Put back ``n`` zeros."""
    for o_start in range(0, n, 256):
        o = o_start + tl.arange(0, 256)
        tl.store(p_shared + o, tl.zeros((256,), tl.int32), mask=o < n)

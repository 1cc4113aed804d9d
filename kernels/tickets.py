"""How the programs of one launch share work and wait for each other: tickets, counters and flags in device memory.

All are int32, zero before the launch and zero again after it, so that nothing need be cleared between launches. They
are acquired and released by one thread of a program. A barrier before it orders the others' stores; after it one comes
with telling them the result, which orders their loads.

In the interpreter programs run one after another: the first draws every ticket, and no wait ever waits.
"""

import triton
import triton.language as tl

LINE = 32
"""Numbers of 128 bytes: what many programs wait for does not share a cache line with what others count."""

TICKET = tl.constexpr(0)
LEFT = tl.constexpr(LINE)
FOUND = tl.constexpr(2 * LINE)
COUNTERS = tl.constexpr(3 * LINE)
"""Where lie the next ticket, how many programs have left, whether something was found, and the first counter."""


@triton.jit
def draw(p_shared):
    """The number of the next ticket."""
    return tl.atomic_add(p_shared + TICKET, 1, sem="relaxed")


@triton.jit
def is_last(p_counter, n):
    """Whether this is the last of ``n`` programs to come here; what all of them have written is visible to that one."""
    tl.debug_barrier()
    return tl.atomic_add(p_counter, 1, sem="acq_rel") == n - 1


@triton.jit
def release(p_flag):
    """Raise a flag: who waits for it sees what this program has written."""
    tl.debug_barrier()
    tl.atomic_xchg(p_flag, 1, sem="release")


@triton.jit
def wait_for(p_flag):
    """Wait until a flag is raised, which is for the holder of a lower ticket to do."""
    # To acquire empties the first cache of all programs beside this one: only once there is something to see. As the
    # condition of a loop, for an atomic whose result nobody uses may be left out.
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

"""The order of work of the one-launch surgery, by the properties that make it right: nothing here runs a kernel."""

import random
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradkern.kernels.settings import FOLD, LAG, PIECE, SMALL_PIECE, SMALL_SEGMENT
from gradkern.ops.layout import TILE, Layout, tensor_layout
from gradkern.ops.one_launch.work_list import WorkList, work_list

SQUARE, WIDE, EMBEDDING = 768 * 768, 4 * 768 * 768, 30522 * 768
# A group for each tensor, in order; one too large for any cache; biases; two without numbers; two tensors outside.
NUMELS = [EMBEDDING, 768, *6 * [SQUARE, 768], WIDE, 3072, 0, WIDE, 768, 0, 2 * SQUARE, 100]
SEGMENTS = [*range(len(NUMELS) - 2), -1, -1]


def layout_of(numels: Sequence[int], segments: Sequence[int]) -> tuple[Layout, int]:
    """The layout with what is outside surgery as one more segment, and how many there are without that."""
    S = max(segments) + 1
    return tensor_layout(tuple(numels), tuple(s if s >= 0 else S for s in segments), S + 1), S


def check(work: WorkList, layout: Layout, S: int) -> None:
    """What holds for every list."""
    first, count, segment, piece = work.items.T
    products, sums = np.flatnonzero(piece >= 0), np.flatnonzero(piece < 0)
    tiles = {True: [], False: []}
    for a, n, s, p in work.items.tolist():
        tiles[p >= 0] += range(a, a + n)
        assert (layout.tiles[a : a + n, 3] == s).all()
    # Every tile once for its Gramian, if it is under surgery, and once to be combined.
    assert sorted(tiles[True]) == np.flatnonzero(layout.tiles[:, 3] < S).tolist()
    assert sorted(tiles[False]) == list(range(len(layout.tiles)))
    # Every piece has its number, and a segment's follow each other, in groups of FOLD.
    assert sorted(piece[products]) == list(range(work.n_pieces))
    group = 0
    for s, (first_piece, n_pieces, first_group) in enumerate(work.segments.tolist()):
        own = products[segment[products] == s]
        assert n_pieces >= 1
        assert piece[own].tolist() == list(range(first_piece, first_piece + n_pieces))
        assert first_group == group
        group += -(-n_pieces // FOLD)
        # Waits are for lower numbers only, and what was read last is read again first.
        waiting = sums[segment[sums] == s]
        assert not len(waiting) or own.max() < waiting.min()
        again = [t for i in waiting for t in range(first[i] + count[i] - 1, first[i] - 1, -1)]
        assert again == np.flatnonzero(layout.tiles[:, 3] == s)[::-1].tolist()
    assert group == work.n_groups
    assert segment[products].tolist() == sorted(segment[products])


@given(
    st.lists(st.tuples(st.integers(0, 40 * TILE), st.integers(-1, 5)), max_size=12).filter(
        lambda tensors: any(s >= 0 for _, s in tensors)
    ),
    st.integers(1, 4),
    st.sampled_from([2, 4, 8]),
)
def test_any_list_of_tensors(tensors: list[tuple[int, int]], T: int, itemsize: int) -> None:
    numels, segments = zip(*tensors, strict=True)
    layout, S = layout_of(numels, segments)
    check(work_list(layout, T, itemsize), layout, S)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("T", [2, 3, 4])
def test_a_combination_follows_its_gramian_by_the_same_number_of_bytes(T: int, itemsize: int) -> None:
    layout, S = layout_of(NUMELS, SEGMENTS)
    work = work_list(layout, T, itemsize)
    check(work, layout, S)
    bytes_of = T * itemsize * np.array([layout.tiles[a : a + n, 2].sum() for a, n, _, _ in work.items.tolist()])
    is_product = work.items[:, 3] >= 0
    read = np.cumsum(np.where(is_product, bytes_of, 0))  # of Gramians, up to and with each piece
    n_with_lag = 0
    for s in range(S):
        own = work.items[:, 2] == s
        if not (own & ~is_product).any():
            continue
        last, start = np.flatnonzero(own & is_product).max(), np.flatnonzero(own & ~is_product).min()
        between = read[start] - read[last]
        if is_product[start:].any():  # else there was nothing left to put between
            assert LAG[itemsize] <= between < LAG[itemsize] + PIECE + T * TILE * itemsize
            n_with_lag += 1
        # Nothing comes between its pieces that is due later.
        later = work.items[start : np.flatnonzero(own).max(), 2][~is_product[start : np.flatnonzero(own).max()]]
        assert (later == s).all()
    assert n_with_lag


def test_what_waits_for_nothing_fills_the_last_gap() -> None:
    layout, S = layout_of(NUMELS, SEGMENTS)
    work = work_list(layout, 3, 4)
    outside = np.flatnonzero(work.items[:, 2] == S)
    assert len(outside)
    assert outside.min() > np.flatnonzero(work.items[:, 3] >= 0).max()
    after = work.items[outside.max() + 1 :, 2].tolist()
    assert after  # as many segments as end within the last bytes
    assert after == sorted(after)


@pytest.mark.parametrize(("T", "itemsize"), [(1, 2), (1, 4), (3, 2), (3, 4), (4, 4), (4, 8)])
def test_pieces_are_of_as_many_whole_tiles_as_they_may_be(T: int, itemsize: int) -> None:
    row = T * itemsize
    small, large = SMALL_SEGMENT // row, SMALL_SEGMENT // row + TILE
    layout, _ = layout_of([small, large], [0, 1])
    items = work_list(layout, T, itemsize).items
    for s, most in ((0, SMALL_PIECE), (1, PIECE)):
        assert items[items[:, 2] == s, 1].max() == max(1, most // (row * TILE))


@pytest.mark.parametrize("programs", [1, 2, 7, 300])
def test_programs_never_wait_for_each_other_in_a_circle(programs: int) -> None:
    """Whoever goes on when, with the next ticket drawn before a piece is worked on: every piece gets done."""
    numels = [n // 64 for n in NUMELS]  # fewer pieces, and a lag past the end of most segments
    layout, S = layout_of(numels, SEGMENTS)
    work = work_list(layout, 3, 4)
    items = work.items.tolist()
    missing = defaultdict(int, enumerate(work.segments[:, 1].tolist()))
    rng = random.Random(programs)
    at_work = [[2 * i, 2 * i + 1] for i in range(programs)]  # what each works on, and its next ticket
    ticket, done = 2 * programs, 0
    while at_work:
        able = [h for h in at_work if h[0] >= len(items) or items[h[0]][3] >= 0 or not missing[items[h[0]][2]]]
        assert able, "all programs wait"
        program = rng.choice(able)
        if program[0] >= len(items):
            at_work.remove(program)
            continue
        _, _, segment, piece = items[program[0]]
        missing[segment] -= piece >= 0
        done += 1
        program[:] = [program[1], ticket]
        ticket += 1
    assert done == len(items)
    assert not any(missing[s] for s in range(S))


def test_it_is_made_once() -> None:
    layout, _ = layout_of([5, TILE], [0, -1])
    work = work_list(layout, 3, 4)
    assert work_list(layout, 3, 4) is work
    items, segments = work.tables_on(torch.device("cpu"))
    assert np.array_equal(items, work.items)
    assert np.array_equal(segments, work.segments)

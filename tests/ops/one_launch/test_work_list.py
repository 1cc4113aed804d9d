"""The order of work of the one-launch surgery, over random layouts: no kernel runs here.

That a kernel's results are right is for ``test_one_launch.py`` to see. What it cannot see is told here: an order in
which some number of programs wait for each other for ever, and layouts too large for the interpreter.
"""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gradkern.kernels.settings import FOLD, PIECE
from gradkern.ops.layout import TILE, tensor_layout
from gradkern.ops.one_launch.work_list import work_list

# Numbers of a tensor: less than some tiles, and more than a cache holds of its rows.
NUMEL = st.integers(0, 40 * TILE) | st.integers(0, 8 << 20)


@given(
    st.lists(st.tuples(NUMEL, st.integers(-1, 5)), max_size=12).filter(lambda tensors: any(s >= 0 for _, s in tensors)),
    st.integers(1, 4),
    st.sampled_from([2, 4, 8]),
)
def test_all_work_is_there_once_and_none_waits_for_later_work(
    tensors: list[tuple[int, int]], T: int, itemsize: int
) -> None:
    """A combination waits for all its segment's Gramian pieces, which have lower tickets.

    A program draws tickets in ascending order. So the lowest ticket that is not done is what some program works on, not
    what it takes next, and all it waits for is done: whatever the number of programs, one of them goes on.
    """
    numels, segments = zip(*tensors, strict=True)
    S = max(segments) + 1  # and as one more segment, what is outside surgery
    layout = tensor_layout(numels, tuple(s if s >= 0 else S for s in segments), S + 1)
    work = work_list(layout, T, itemsize)
    assert work_list(layout, T, itemsize) is work  # copied to a device once, where a capture has to find it
    first, count, segment, piece = work.items.T
    tile = np.concatenate([np.arange(a, a + n) for a, n in zip(first, count, strict=True)])
    assert (layout.tiles[tile, 3] == np.repeat(segment, count)).all()
    is_product = piece >= 0
    of_product = np.repeat(is_product, count)
    assert np.sort(tile[of_product]).tolist() == np.flatnonzero(layout.tiles[:, 3] < S).tolist()
    assert np.sort(tile[~of_product]).tolist() == list(range(len(layout.tiles)))
    assert (count * TILE * T * itemsize <= PIECE).all()  # float32 sums stay short, and every program gets some work

    # A segment's pieces and groups have numbers of their own, by which partial sums are stored and counted.
    ticket = np.arange(len(work.items))
    next_piece = next_group = 0
    for s, (first_piece, n_pieces, first_group) in enumerate(work.segments.tolist()):
        products, sums = ticket[is_product & (segment == s)], ticket[~is_product & (segment == s)]
        assert (first_piece, first_group) == (next_piece, next_group)
        assert np.sort(piece[products]).tolist() == list(range(first_piece, first_piece + n_pieces))
        assert n_pieces >= 1
        assert not len(sums) or products.max() < sums.min()
        next_piece, next_group = first_piece + n_pieces, first_group + -(-n_pieces // FOLD)
    assert (work.n_pieces, work.n_groups) == (next_piece, next_group)
    assert is_product.sum() == next_piece

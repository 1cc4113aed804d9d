"""Bytes that the kernels read and write, compared with the least possible: 2T + 1 words for each parameter.

In words per parameter of T rows: a Gramian reads T, a combination reads T and writes 1. Where a share of the blocks is
kept, only that share of the rows is read.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gradkern.ops.arguments import AdamWState, AdamWStep, Coins, Mask, ProjectionArguments, TaskGrads
from gradkern.ops.layout import TILE
from tests import interpreter
from tests.ptx import option
from tests.tolerances import TOLERANCES, assert_near

if reason := interpreter.why_not():
    pytest.skip(reason, allow_module_level=True)
if option.wanted():
    pytest.skip("the counter of bytes watches the interpreter", allow_module_level=True)

from gradkern.ops.one_launch.surgery import surgery
from gradkern.ops.triton.adamw import adamw
from gradkern.ops.triton.combine import combine_tensors
from gradkern.ops.triton.entries import gather, scatter
from gradkern.ops.triton.entrywise import graddrop, trimmed_mean
from gradkern.ops.triton.gramian import gramian_tensors
from tests.traffic import SECTOR, aligned, watching

T = 3
NUMELS = [TILE, TILE + 640, 640]
P = sum(NUMELS)
UNITS = [0, 1 << 20, 1 << 21]


class Problem(NamedTuple):
    """T gradients of the tensors, what they are combined into, and the weights."""

    rows: TaskGrads
    out: list[Tensor]
    w: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        """The gradients and the results."""
        return [*self.rows.grads, *self.out]


@pytest.fixture
def given() -> Problem:
    grads = [aligned(numel) for _ in range(T) for numel in NUMELS]
    return Problem(TaskGrads(grads, [0] * len(NUMELS), 1), [aligned(numel) for numel in NUMELS], torch.randn(1, T))


def mask(block: int, p: float) -> Mask:
    """Return the mask that drops a share ``p`` of the blocks."""
    return Mask(UNITS, block, torch.tensor([11, 5, round(p * (1 << 32))]))


def pcgrad() -> ProjectionArguments:
    """Return PCGrad in random orders."""
    return ProjectionArguments(torch.rand(1, T, T), "all", None, None, 0.0, mean=False)


def test_a_dense_step_moves_each_row_twice_and_the_result_once(given: Problem) -> None:
    with watching(given.tensors) as moved:
        gramian_tensors(given.rows)
        assert moved.read == 4 * T * P
        combine_tensors(given.rows, given.w, given.out)
    assert (moved.read, moved.written) == (4 * 2 * T * P, 4 * P)
    # Tiles, addresses, weights, partial sums: a sector each, some sixty for a tile. Combining asks for its own once for
    # each of a tile's four blocks; the cache answers three of them.
    assert moved.elsewhere < 64 * SECTOR * sum(-(-numel // TILE) for numel in NUMELS)


def test_a_result_in_the_place_of_a_row_moves_as_much_and_no_more(given: Problem) -> None:
    """The result overwrites the second row of three, and nothing is allocated."""
    second = given.rows.grads[len(NUMELS) : 2 * len(NUMELS)]
    expected = [sum(w * g for w, g in zip(given.w[0], given.rows.column(k), strict=True)) for k in range(len(NUMELS))]
    with watching(given.rows.grads) as moved:
        combine_tensors(given.rows, given.w, second)
    assert (moved.read, moved.written) == (4 * T * P, 4 * P)
    for g, e in zip(second, expected, strict=True):
        assert_near(g, e, e.abs().max(), TOLERANCES[torch.float32])


@pytest.mark.parametrize("block", [None, 128])
@pytest.mark.parametrize("combine", ["graddrop", "graddrop in full", "trimmed_mean", "trimmed_mean in full"])
def test_entry_by_entry_each_row_moves_once(given: Problem, combine: str, block: int | None) -> None:
    """No mask of signs and no order is stored. The tables are read once for each block of a tile."""
    masked, kept = None if block is None else mask(block, 0.45), torch.tensor(0)
    ones = torch.ones(2, T) if combine.endswith("in full") else None
    with watching(given.tensors) as moved:
        if combine.startswith("graddrop"):
            graddrop(given.rows, Coins(UNITS, torch.tensor([1, 2])), ones, given.out, masked, kept)
        else:
            trimmed_mean(given.rows, 1, None if ones is None else ones[0], given.out, masked, kept)
    assert (moved.read, moved.written) == (4 * T * (P if block is None else int(kept)), 4 * P)
    assert moved.elsewhere < 128 * SECTOR * sum(-(-numel // TILE) for numel in NUMELS)


@pytest.mark.parametrize("in_place", [False, True])
def test_one_launch_moves_as_much_and_no_more(given: Problem, in_place: bool) -> None:
    out = given.rows.grads[: len(NUMELS)] if in_place else given.out
    with watching(given.tensors) as moved:
        surgery(given.rows, pcgrad(), out)
    assert (moved.read, moved.written) == (4 * 2 * T * P, 4 * P)
    # As above, and for each piece an entry of the work list, and for the segment its solution.
    assert moved.elsewhere < 64 * SECTOR * sum(-(-numel // TILE) for numel in NUMELS)


@pytest.mark.parametrize("products_masked", [False, True])
def test_one_launch_reads_nothing_of_dropped_blocks(given: Problem, products_masked: bool) -> None:
    kept = torch.tensor(0)
    with watching(given.tensors) as moved:
        surgery(given.rows, pcgrad(), given.out, mask(128, 0.45), products_masked, kept)
    of_products = 4 * T * (int(kept) if products_masked else P)
    assert (moved.read, moved.written) == (of_products + 4 * T * int(kept), 4 * P)


@pytest.mark.parametrize("p", [0.3, 0.45, 0.6])
@pytest.mark.parametrize("block", [128, 512])
def test_of_dropped_blocks_nothing_is_read(given: Problem, block: int, p: float) -> None:
    kept = torch.tensor(0)
    with watching(given.tensors) as products:
        gramian_tensors(given.rows, mask(block, p))
    with watching(given.tensors) as sums:
        combine_tensors(given.rows, given.w, given.out, mask(block, p), kept)
    share = int(kept) / P
    assert abs(share - (1 - p)) < 4 * (p * (1 - p) * block / P) ** 0.5  # four standard deviations of so many blocks
    # Blocks and tensors are whole sectors here, so nothing but the kept ones.
    assert products.read == sums.read == 4 * T * int(kept)
    assert (products.written, sums.written) == (0, 4 * P)


def test_single_elements_are_dropped_without_reading_less(given: Problem) -> None:
    """One kept element of eight is enough for its sector to be read; loads stay whole."""
    with watching(given.tensors) as moved:
        gramian_tensors(given.rows, mask(1, 0.6))
        combine_tensors(given.rows, given.w, given.out, mask(1, 0.6))
    assert 0.97 * 4 * 2 * T * P < moved.read <= 4 * 2 * T * P  # a short tile leaves out sectors of eight dropped
    assert moved.written == 4 * P


@pytest.mark.parametrize("n_moments", [2, 3])
def test_an_update_reads_each_row_and_moves_parameter_and_moments(given: Problem, n_moments: int) -> None:
    """The combined gradient goes to no memory, which saves a word to write and one to read."""
    params = [aligned(numel) for numel in NUMELS]
    moments = [aligned(numel).abs_() for _ in range(n_moments) for numel in NUMELS]
    steps = [torch.ones(()) for _ in NUMELS]
    step = AdamWStep(None, None, [1e-3, 0.9, 0.999, 0.01, 1e-8])
    with watching([*given.rows.grads, *params, *moments]) as moved:
        adamw(given.rows, given.w, AdamWState(params, moments, steps), step)
    assert (moved.read, moved.written) == (4 * (T + 1 + n_moments) * P, 4 * (1 + n_moments) * P)


def test_a_row_of_weight_zero_is_not_read(given: Problem) -> None:
    given.w[0, 1] = 0
    with watching(given.rows.grads) as moved:
        combine_tensors(given.rows, given.w, given.out)
    assert moved.read == 4 * (T - 1) * P


def test_entries_cost_a_sector_each(given: Problem) -> None:
    d = 300
    index = torch.arange(d) * 31 + 5  # no two in one sector
    values = aligned(T * d)
    with watching(given.rows.grads) as moved:
        values = gather(given.rows.grads, NUMELS, index)
    assert moved.read == SECTOR * T * d
    with watching(given.out) as moved:
        scatter(values[0], NUMELS, index, given.out)
    assert (moved.read, moved.written) == (0, SECTOR * d)

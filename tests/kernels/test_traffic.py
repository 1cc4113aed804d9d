"""What the kernels read and write, held against the least there is: 2T + 1 words for each parameter.

In words per parameter of T rows: a Gramian reads T, a combination reads T and writes 1. Where a share of the blocks is
kept, only that share of the rows is read.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gradkern.ops.layout import TILE
from tests import interpreter
from tests.tolerances import TOLERANCES, assert_near

if reason := interpreter.why_not():
    pytest.skip(reason, allow_module_level=True)

from gradkern.kernels import settings
from gradkern.ops.one_launch import surgery as cuda_surgery
from gradkern.ops.triton import rows as cuda
from tests.traffic import SECTOR, aligned, watching

T = 3
NUMELS = [TILE, TILE + 640, 640]
P = sum(NUMELS)
SEGMENTS = [0, 0, 0]
UNITS = [0, 1 << 20, 1 << 21]


class Rows(NamedTuple):
    """T gradients of the tensors, what they are combined into, and the weights."""

    grads: list[Tensor]
    out: list[Tensor]
    w: Tensor


@pytest.fixture
def rows() -> Rows:
    grads = [aligned(numel) for _ in range(T) for numel in NUMELS]
    return Rows(grads, [aligned(numel) for numel in NUMELS], torch.randn(1, T))


def mask(p: float) -> Tensor:
    return torch.tensor([11, 5, round(p * (1 << 32))])


def test_a_dense_step_moves_each_row_twice_and_the_result_once(rows: Rows) -> None:
    with watching([*rows.grads, *rows.out]) as moved:
        cuda.gramian_tensors(rows.grads, SEGMENTS, 1)
        assert moved.read == 4 * T * P
        cuda.combine_tensors(rows.grads, rows.w, SEGMENTS, rows.out)
    assert (moved.read, moved.written) == (4 * 2 * T * P, 4 * P)
    # Tiles, addresses, weights, partial sums: a sector each, some thirty for a tile.
    assert moved.elsewhere < 32 * SECTOR * sum(-(-numel // TILE) for numel in NUMELS)


def test_a_result_in_the_place_of_a_row_moves_as_much_and_no_more(rows: Rows) -> None:
    """The second row of three, in memory that nothing is allocated for."""
    second = rows.grads[len(NUMELS) : 2 * len(NUMELS)]
    expected = [
        sum(w * g for w, g in zip(rows.w[0], rows.grads[k :: len(NUMELS)], strict=True)) for k in range(len(NUMELS))
    ]
    with watching(rows.grads) as moved:
        cuda.combine_tensors(rows.grads, rows.w, SEGMENTS, second)
    assert (moved.read, moved.written) == (4 * T * P, 4 * P)
    for g, e in zip(second, expected, strict=True):
        assert_near(g, e, e.abs().max(), TOLERANCES[torch.float32])


@pytest.mark.parametrize("in_place", [False, True])
def test_one_launch_moves_as_much_and_no_more(rows: Rows, in_place: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "ONE_LAUNCH", {(T, 4): range(P, P + 1)})
    out = rows.grads[: len(NUMELS)] if in_place else rows.out
    with watching([*rows.grads, *rows.out]) as moved:
        cuda_surgery.pcgrad_tensors(rows.grads, SEGMENTS, 1, torch.rand(1, T, T), "all", False, None, None, out)
    assert (moved.read, moved.written) == (4 * 2 * T * P, 4 * P)
    # As above, and for each piece an entry of the work list, and for the segment its solution.
    assert moved.elsewhere < 64 * SECTOR * sum(-(-numel // TILE) for numel in NUMELS)


def test_one_launch_reads_nothing_of_dropped_blocks(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "ONE_LAUNCH", {(T, 4): range(P, P + 1)})
    keys = torch.rand(1, T, T)
    for products in (False, True):
        masking = UNITS, 128, mask(0.45), products
        with watching([*rows.grads, *rows.out]) as moved:
            _, _, count = cuda_surgery.pcgrad_masked(
                rows.grads, SEGMENTS, 1, keys, "all", False, None, None, *masking, rows.out
            )
        gramian = 4 * T * (int(count) if products else P)
        assert (moved.read, moved.written) == (gramian + 4 * T * int(count), 4 * P)


@pytest.mark.parametrize("p", [0.3, 0.45, 0.6])
@pytest.mark.parametrize("block", [128, 512])
def test_of_dropped_blocks_nothing_is_read(rows: Rows, block: int, p: float) -> None:
    with watching([*rows.grads, *rows.out]) as gramian:
        cuda.gramian_masked(rows.grads, SEGMENTS, 1, UNITS, block, mask(p))
    with watching([*rows.grads, *rows.out]) as combine:
        count = cuda.combine_masked(rows.grads, rows.w, SEGMENTS, UNITS, block, mask(p), rows.out)
    kept = int(count) / P
    assert abs(kept - (1 - p)) < 4 * (p * (1 - p) * block / P) ** 0.5  # four standard deviations of so many blocks
    # Blocks and tensors are whole sectors here, so nothing but the kept ones.
    assert gramian.read == combine.read == 4 * T * int(count)
    assert (gramian.written, combine.written) == (0, 4 * P)


def test_single_elements_are_dropped_without_reading_less(rows: Rows) -> None:
    """A sector is read for one kept element of its eight; loads stay whole."""
    with watching([*rows.grads, *rows.out]) as moved:
        cuda.gramian_masked(rows.grads, SEGMENTS, 1, UNITS, 1, mask(0.6))
        cuda.combine_masked(rows.grads, rows.w, SEGMENTS, UNITS, 1, mask(0.6), rows.out)
    assert 0.97 * 4 * 2 * T * P < moved.read <= 4 * 2 * T * P  # a short tile leaves out sectors of eight dropped
    assert moved.written == 4 * P


@pytest.mark.parametrize("n_moments", [2, 3])
def test_an_update_reads_each_row_and_moves_parameter_and_moments(rows: Rows, n_moments: int) -> None:
    """The combined gradient, a word to write and one to read where it is not made in passing, moves nowhere."""
    params = [aligned(numel) for numel in NUMELS]
    moments = [aligned(numel).abs_() for _ in range(n_moments) for numel in NUMELS]
    steps = [torch.ones(()) for _ in NUMELS]
    with watching([*rows.grads, *params, *moments]) as moved:
        cuda.adamw(rows.grads, rows.w, SEGMENTS, params, moments, steps, None, None, [1e-3, 0.9, 0.999, 0.01, 1e-8])
    assert (moved.read, moved.written) == (4 * (T + 1 + n_moments) * P, 4 * (1 + n_moments) * P)


def test_a_row_of_weight_zero_is_not_read(rows: Rows) -> None:
    rows.w[0, 1] = 0
    with watching(rows.grads) as moved:
        cuda.combine_tensors(rows.grads, rows.w, SEGMENTS, rows.out)
    assert moved.read == 4 * (T - 1) * P


def test_entries_cost_a_sector_each(rows: Rows) -> None:
    d = 300
    index = torch.arange(d) * 31 + 5  # no two in one sector
    values = aligned(T * d)
    with watching(rows.grads) as moved:
        values = cuda.gather(rows.grads, NUMELS, index)
    assert moved.read == SECTOR * T * d
    with watching(rows.out) as moved:
        cuda.scatter(values[0], NUMELS, index, rows.out)
    assert (moved.read, moved.written) == (0, SECTOR * d)

"""Gramians in plain PyTorch.

A skinny product J Jᵀ leaves most of the memory bandwidth unused, because a matrix multiply is cut along its output,
which here is only T x T. So the columns are cut into chunks, a batched product multiplies each chunk with itself, and
the T x T partial products are summed in a fixed order. Gradients of several tensors are gathered a cache-sized block
at a time; the chunks of a segment run on across its tensors, so a list of tensors and the matrix of the same columns
give the same bits.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from gradkern.ops.blocks import BLOCK, Columns, Erase, Scratch, converted, flat, gathered
from gradkern.ops.schema import arithmetic_dtype, sample

CHUNK = 2048
FEW_ROWS_CHUNK = 6144
"""Least columns of one product in the batch, up to three times as many; with up to four rows the latter. Measured at
T = 2 … 40: flat from 1024 to 8192; for few rows to 32768, where fewer chunks leave fewer partial products to sum."""
ONE_PRODUCT = 1 << 16
"""Numbers of all rows up to which one product takes less time than summing up those of a batch."""
ONE_SUM = 1 << 14
"""Columns up to which one product is precise enough: of so many terms from 16-bit rows, whose roundings do not cancel,
a float32 sum may be off by 2e-6 of itself, and of twice as many by 4e-6."""
ALIGN = 8
"""A chunk is a multiple of this many columns, 32 bytes of float32: it divides most layers' sizes, to leave no rest."""


def matrix_gramian(J: Tensor) -> Tensor:
    """J Jᵀ, (T, T)."""
    T, P = J.shape
    work = work_dtype(J)
    # What a BLAS may sum in an order that depends on where the rows lie is copied to where rows lie that are gathered:
    # float64, and whatever it is given in one product.
    as_stored = J.dtype == torch.float32 == work and J.stride(1) == 1 and (T <= 3 or _chunk_columns(T, P) < P)
    blocks = (J,) if as_stored else converted(J, work, _block_columns(T, P))
    M = _sum_of_products(blocks, T, P)
    wanted = arithmetic_dtype(J.dtype)
    return M if work == wanted else M.to(wanted)


def segment_gramians(
    grads: Sequence[Tensor | None], segments: Sequence[int], n_segments: int, erase: Erase | None = None
) -> Tensor:
    """(n_segments, T, T), J Jᵀ of the rows that the tensors of each segment form, of what ``erase`` leaves."""
    n = len(segments)
    like = sample(grads)
    members: dict[int, dict[int, Sequence[Tensor | None]]] = defaultdict(dict)
    for k, s in enumerate(segments):
        column = grads[k::n]
        if any(g is not None and g.numel() for g in column):
            members[s][k] = [None if g is None else flat(g) for g in column]
    scratch = Scratch(like, work_dtype(like))
    M = like.new_zeros((n_segments, len(grads) // n, len(grads) // n), dtype=arithmetic_dtype(like.dtype))
    for s, columns in members.items():
        M[s] = _tensors_gramian(columns, scratch, erase)
    return M


def _tensors_gramian(columns: Columns, scratch: Scratch, erase: Erase | None) -> Tensor:
    T = len(next(iter(columns.values())))
    P = sum(next(len(g) for g in column if g is not None) for column in columns.values())
    return _sum_of_products(gathered(columns, scratch, _block_columns(T, P), erase), T, P)


def _sum_of_products(blocks: Iterable[Tensor], T: int, P: int) -> Tensor:
    """Σ X Xᵀ over blocks X of the P columns; every block but the last holds whole pairs of chunks."""
    width = _chunk_columns(T, P)
    if width == P:
        (X,) = blocks
        return torch.mm(X, X.t())
    lefts = _row_blocks(T)
    partials: list[list[Tensor]] = [[] for _ in lefts]
    for X in blocks:
        n = X.shape[1] // (2 * width) * 2
        chunks = X.as_strided((n, T, width), (width, X.stride(0), 1))
        for of_left, left in zip(partials, lefts, strict=True):
            of_left.append(torch.bmm(chunks[:, left.start :], chunks[:, left].mT))
        rest = X[:, n * width :].contiguous()
    total = _symmetric(lefts, [(p[0] if len(p) == 1 else torch.cat(p)).sum(0) for p in partials])
    return total.add_(_sum_of_products((rest,), T, rest.shape[1])) if rest.shape[1] else total


def _row_blocks(T: int) -> list[slice]:
    """Rows that are multiplied with themselves and those after them: half of M is known from the other half.

    Of more rows at a time more is computed twice, while fewer leave a BLAS less to do for each number it packs. In
    blocks 20 rows of a million take 0.6 times as long as in one, 40 rows 0.75 times, 48 to 64 rows as long.
    """
    step = 16 if T <= 32 else 32
    return [slice(a, min(a + step, T)) for a in range(0, T, step)]


def _symmetric(lefts: list[slice], products: list[Tensor]) -> Tensor:
    """M, of which ``products`` holds the columns ``lefts`` from the diagonal down."""
    if len(lefts) == 1:
        return products[0]
    T = len(products[0])
    M = products[0].new_empty((T, T))
    for left, product in zip(lefts, products, strict=True):
        M[left, left.start :] = product.mT
        M[left.start :, left] = product
    return M


@lru_cache(maxsize=1024)
def _chunk_columns(T: int, P: int) -> int:
    """Columns of a chunk: those that divide P if any do, so that no rest costs a product of its own.

    All P where one product is the faster and precise enough. A BLAS may sum one product of four rows or more in an
    order that depends on where in memory the rows lie; products in a batch, or of two rows or three, it does not.
    """
    if P < 64 or (P <= ONE_SUM and T * P <= ONE_PRODUCT):
        return P
    least = FEW_ROWS_CHUNK if T <= 4 else CHUNK
    for width in range(least, min(3 * least, P // 2) + 1, ALIGN):
        if P % (2 * width) == 0:
            return width
    n = 2 * max(1, P // (2 * least))  # even, for cores come in twos
    return P // n // ALIGN * ALIGN if n <= 64 else least


def _block_columns(T: int, P: int) -> int:
    """Columns of a block of T rows: as many whole pairs of chunks as ``BLOCK`` holds, one at least."""
    pair = 2 * max(1, _chunk_columns(T, P))
    return max(1, BLOCK // T // pair) * pair


def work_dtype(rows: Tensor) -> torch.dtype:
    """What the products are computed in. Where the user lets matrix products round to bfloat16 or TF32, float64:
    that setting is global, so it could not be turned off here without touching other threads' products.
    """
    if rows.dtype == torch.float64:
        return torch.float64
    setting = _matmul_precision("mkldnn" if rows.device.type == "cpu" else "cuda", "matmul")
    return torch.float32 if setting in ("none", "ieee") else torch.float64


# What ``torch.backends.mkldnn.matmul.fp32_precision`` reads; through all its properties that costs 1 µs a call.
_matmul_precision: Callable[[str, str], str] = torch._C._get_fp32_precision_getter

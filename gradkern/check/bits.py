"""A case of the self-check: no address, layout or number of threads changes a bit of a result on the CPU."""

from collections.abc import Iterator

import torch
from torch import Tensor

from gradkern.ops import combine, gramian, operators, project
from gradkern.ops.arguments import TaskGrads
from gradkern.ops.dtypes import arithmetic_dtype

SHAPES = [(1, 1000), (3, 200_001), (17, 32_000)]
"""T x P: rows in one block of memory and in several, with whole chunks and a rest."""
DTYPES = (torch.float32, torch.float64)
OFFSETS = (1, 8)
"""Numbers of elements by which a copy is shifted in memory."""
THREADS = (1, 3)

Results = tuple[Tensor, ...]


def differences() -> Iterator[str]:
    """Yield a description of everything that changes the bits of a Gramian, a combination or a projection."""
    for T, P in SHAPES:
        for dtype in DTYPES:
            J = torch.randn((T, P), dtype=torch.float64, device="cpu").to(dtype)
            w = torch.randn((1, T), dtype=torch.float64, device="cpu")
            case = f"{str(dtype).removeprefix('torch.')}, T = {T}, P = {P:,}"
            expected = _of_matrix(J, w)
            for offset in OFFSETS:
                if not _equal(_of_matrix(_moved(J, offset), w), expected):
                    yield f"{case}: other bits {offset} elements further on"
            if not _equal(_of_tensors(J, w), expected):
                yield f"{case}: other bits as a list of tensors"
            if any(not _equal(of_some, expected) for of_some in _by_threads(J, w)):
                yield f"{case}: other bits by another number of threads"


def _of_matrix(J: Tensor, w: Tensor) -> Results:
    return gramian(J), combine(J, w[0]), project(J, w)[0]


def _of_tensors(J: Tensor, w: Tensor) -> Results:
    rows, out = TaskGrads([row.clone() for row in J], [0], 1), torch.empty_like(J[0])
    operators.combine_tensors(rows, w.to(arithmetic_dtype(J.dtype)), [out], None, None)
    return operators.gramian_tensors(rows, None)[0], out, out


def _moved(J: Tensor, offset: int) -> Tensor:
    """Return the same numbers ``offset`` elements after an aligned address, with ``offset`` more between the rows."""
    T, P = J.shape
    memory = J.new_empty(T * (P + offset) + offset)
    return memory[offset:].as_strided((T, P), (P + offset, 1)).copy_(J)


def _by_threads(J: Tensor, w: Tensor) -> Iterator[Results]:
    before = torch.get_num_threads()
    try:
        for threads in THREADS:
            torch.set_num_threads(threads)
            yield _of_matrix(J, w)
    finally:
        torch.set_num_threads(before)


def _equal(results: Results, expected: Results) -> bool:
    return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))

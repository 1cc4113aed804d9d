"""Symmetric eigenvalue problems, with accurate small eigenvalues for Gramians of rows of very different lengths.

On a CPU LAPACK solves them. The rows are put in order of their lengths first, the longest first: then its
transformations keep small entries apart from large ones, and small eigenvalues keep their digits, up to 25 rows. (For
more LAPACK divides and conquers, and digits are relative to the largest eigenvalue.) On a device, and wherever the host
may not look, Jacobi's method solves them. A sweep rotates every two rows and columns once so that their common entry
becomes 0, T / 2 disjoint pairs at a time.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from gradkern.aggregators.solvers.arrays import Array, every, identity, lu_solved, on_device, space
from gradkern.ops import operators
from gradkern.ops.limits import sweeps
from gradkern.ops.pytorch.backend import implements

REGULAR = 1e6
"""The condition number up to which an inverse is as good as one by eigenvalues: its residual is below 1e-9."""


def eigh(M: Array) -> tuple[Array, Array]:
    """Return the eigenvalues (..., T) in ascending order, and the eigenvectors (..., T, T), as columns.

    Args:
        M: (..., T, T), symmetric. One with an entry that is not finite gets eigenvalues that are not a number.
    """
    xp = space(M)
    finite = xp.isfinite(M).all(-1).all(-1)[..., None]
    M = xp.where(finite[..., None], M, identity(M))
    values, vectors = _lapack(M) if xp is np else _jacobi(M)
    return xp.where(finite, values, xp.nan), vectors


def numerical_rank(values: Array, eps: Array | float) -> Array:
    """Return which eigenvalues (..., T) of a Gramian are not rounding: they exceed the largest, times T eps."""
    return values > space(values).amax(values, -1)[..., None] * values.shape[-1] * eps


def spread(values: Array, vectors: Array, b: Array) -> Array:
    """Return V (λ ⊙ Vᵀb) (..., T): b under the function of a matrix with eigenvalues λ and eigenvectors V."""
    return (vectors @ (values[..., None] * (vectors.swapaxes(-1, -2) @ b[..., None])))[..., 0]


def pseudo_inverse(M: Array, b: Array, eps: Array | float) -> Array:
    """Return M⁺ b (..., T), with the inverse over the numerical rank of M (..., T, T).

    If b is orthogonal to the range of M, up to a cosine of √eps, the result is 0: it would be mostly rounding. On a CPU
    a matrix far from singular is inverted without eigenvalues.

    Args:
        M: symmetric and positive semidefinite.
        b: (..., T).
        eps: the relative precision of M's entries, for :func:`numerical_rank`: a number, or (..., 1).
    """
    if not isinstance(M, np.ndarray):
        return _by_eigenvalues(M, b, eps)
    inverse = lu_solved(M, identity(M))
    # The largest eigenvalue is at most the trace, and the smallest at least the reciprocal of the inverse's norm.
    condition = M.diagonal(0, -2, -1).sum(-1) ** 2 * (inverse * inverse).sum((-2, -1))
    precision = eps * M.shape[-1]
    limit = min(REGULAR, 1 / precision) if isinstance(precision, float) else np.minimum(REGULAR, 1 / precision)
    regular = condition[..., None] < limit**2
    x = (inverse @ b[..., None])[..., 0]
    return x if every(regular) else np.where(regular, x, _by_eigenvalues(M, b, eps))


def _by_eigenvalues(M: Array, b: Array, eps: Array | float) -> Array:
    xp = space(M)
    values, vectors = eigh(M)
    rank = numerical_rank(values, eps)
    inside = xp.where(rank, (vectors.swapaxes(-1, -2) @ b[..., None])[..., 0], 0.0)
    solvable = (inside * inside).sum(-1)[..., None] > eps * (b * b).sum(-1)[..., None]
    inverse = xp.where(rank & solvable, 1 / values, 0.0 * values)  # which keeps NaN
    return (vectors @ (inverse * inside)[..., None])[..., 0]


def eigen_residual(M: Array, values: Array, vectors: Array) -> Array:
    """Return by how much V diag(λ) Vᵀ misses M, relative to its largest entry, or VᵀV the identity (...)."""
    xp = space(M)
    transposed = vectors.swapaxes(-1, -2)
    product = abs((vectors * values[..., None, :]) @ transposed - M)
    largest = xp.amax(abs(M), (-2, -1))
    unlike = xp.amax(abs(transposed @ vectors - identity(M)), (-2, -1))
    return xp.maximum(xp.amax(product, (-2, -1)) / xp.where(largest > 0, largest, 1.0), unlike)


def _lapack(M: Array) -> tuple[Array, Array]:
    order = np.argsort(-M.diagonal(0, -2, -1), -1)
    ordered = np.take_along_axis(np.take_along_axis(M, order[..., None], -2), order[..., None, :], -1)
    values, vectors = np.linalg.eigh(ordered, "L")
    return values, np.take_along_axis(vectors, np.argsort(order, -1)[..., None], -2)


def _jacobi(M: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = (operators.jacobi if on_device(M) else _rotated)(M)
    values, order = values.sort(-1)
    return values, vectors.gather(-1, order[..., None, :].expand_as(M))


@implements(operators.jacobi)
def _rotated(M: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues in no order, and the eigenvectors; on a device, where there is no kernel for it."""
    T = M.shape[-1]
    half = (T + 1) // 2
    A = pad(M, (0, T % 2, 0, T % 2))
    eye = identity(A)
    # A rotation of every i < half with i + half: c in place of the identity's 1, s and -s beside it. After each, the
    # order of rows and columns turns, so that all pairs meet within a sweep, and the order is as before.
    even = _turned(eye, half)
    odd = _turned(torch.cat((eye[half:], -eye[:half])), half)
    V = eye
    for _ in range(sweeps(T) * (2 * half - 1)):
        d = A.diagonal(0, -2, -1)
        angle = torch.atan(2 * A.diagonal(half, -2, -1) / (d[..., half:] - d[..., :half])).nan_to_num(0.0) / 2
        angle = torch.cat((angle, angle), -1)[..., None]
        R = torch.cos(angle) * even + torch.sin(angle) * odd
        A = R.mT @ A @ R
        A = (A + A.mT) / 2
        V = V @ R
    return A.diagonal(0, -2, -1)[..., :T].clone(), V[..., :T, :T].expand_as(M).contiguous()


def _turned(X: Tensor, half: int) -> Tensor:
    """Return columns in the order of the next round of a tournament: the first stays, the others go round."""
    if half == 1:
        return X
    first, top, bottom = X[:, :1], X[:, 1:half], X[:, half:]
    return torch.cat((first, bottom[:, :1], top[:, :-1], bottom[:, 1:], top[:, -1:]), 1)

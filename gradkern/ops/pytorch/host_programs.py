"""The methods' T x T programs on the host: all segments and all tasks step through their partners together, in NumPy.

On matrices this small the time goes into the calls, and a NumPy call takes a third of the time of a PyTorch call.
"""

from collections.abc import Iterator
from math import sqrt
from operator import mul
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradkern.ops import operators
from gradkern.ops.cosines import cosines
from gradkern.ops.partners import check_partner
from gradkern.ops.pytorch.backend import implements

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

FEW = 32
"""The number of tasks, of all segments together, up to which PCGrad's coefficients take less time task by task than in
NumPy: 4 µs, not 43, for T = 3, 75 and 185 for T = 16; for T = 32 and for 17 segments of T = 3 both take the same."""
FEW_OF_GRADVAC = 12
"""The same number for GradVac, whose visits take longer task by task: 34 µs, not 141, for T = 3, 175 and 319 for T = 8;
for T = 12 and for eight segments of T = 3 both take the same."""


@implements(operators.pcgrad)
def pcgrad(M: Tensor, order_keys: Tensor | None, partner: str) -> Tensor:
    """Compute PCGrad's coefficients, of M's dtype."""
    return _like(pcgrad_coefficients(M, order_keys, partner), M)


def pcgrad_coefficients(M: Tensor, order_keys: Tensor | None, partner: str) -> Floats:
    """Return (S, T, T): Yu et al. 2020, Algorithm 1; other partners: Rhapsody on a Theme of Gradient Surgery."""
    check_partner(order_keys, partner)
    if partner == "average":
        return _average(M)
    if order_keys is None:
        phi = cosines(M.double())
        order_keys = (phi if partner == "most_different" else -phi).nan_to_num(torch.inf)
    S, T, _ = M.shape
    visits = T - 1 if partner == "all" else 1
    if S * T > FEW:
        return _many(M, order_keys, visits)
    by_segment = zip(M.tolist(), order_keys.expand_as(M).tolist(), strict=True)
    return np.array([_few(m, k, visits) for m, k in by_segment])


def pcgrad_weights(M: Tensor, order_keys: Tensor | None, partner: str, mean: bool) -> list[float]:
    """Return the sum or mean over tasks of one Gramian's coefficients (T, T); few tasks need no array."""
    T = M.shape[0]
    if partner == "all" and order_keys is not None and T <= FEW:
        C = _few(M.tolist(), order_keys.tolist()[0], T - 1)
    else:
        C = pcgrad_coefficients(M.unsqueeze(0), order_keys, partner)[0].tolist()
    return [sum(column) / T if mean else sum(column) for column in zip(*C, strict=True)]


def _average(M: Tensor) -> Floats:
    """Return the coefficients c_i = 1, and c_j = -M_ij / M_jj / n for every j in conflict with i, one of n partners."""
    rows = _host(M)
    i = np.arange(M.shape[-1])
    squares = rows[:, None, i, i]
    nonzero = squares != 0
    partners = nonzero.sum(-1, keepdims=True) - nonzero.swapaxes(-1, -2)
    with np.errstate(all="ignore"):  # as in _many
        C = np.where((rows < 0) & (squares > 0), -rows / squares, 0) / np.maximum(1, partners)
    C[:, i, i] = 1
    return C


def _many(M: Tensor, order_keys: Tensor, visits: int) -> Floats:
    """Return the coefficients of all tasks of all segments, computed together."""
    S, T, _ = M.shape
    rows = _host(M).reshape(S * T, T)
    C, D = _started(rows)
    task = np.arange(S * T)
    squares = rows[task, task % T]
    with np.errstate(all="ignore"):  # a gradient scaler deals with overflow
        for partner, row in _partners(order_keys, squares.reshape(S, T), visits):
            s = D[task, partner]
            conflict = np.flatnonzero((s < 0) & (squares[row] > 0))
            j = row[conflict]
            step = -s[conflict] / squares[j]
            C[conflict, partner[conflict]] = step
            D[conflict] += step[:, None] * rows[j]
    return C.reshape(S, T, T)


def _few(M: list[list[float]], order_keys: list[list[float]], visits: int) -> list[list[float]]:
    """Return the coefficients of one segment, computed task by task."""
    T = len(M)
    C = []
    for i in range(T):
        c = [0.0] * T
        c[i] = 1.0
        terms: list[tuple[float, list[float]]] = []
        partners = _others(order_keys[i], i)
        if visits < len(partners):
            partners = [j for j in partners if M[j][j] != 0][:visits]
        for j in partners:
            s = M[i][j]
            for a, row in terms:
                s += a * row[j]
            if s < 0 < M[j][j]:
                c[j] = -s / M[j][j]
                terms.append((c[j], M[j]))
        C.append(c)
    return C


@implements(operators.gradvac)
def gradvac(M: Tensor, order_keys: Tensor, targets: Tensor, update_mask: Tensor, beta: float) -> Tensor:
    """Compute GradVac's coefficients (Wang et al. 2021), and move the ``targets`` in the rows of ``update_mask``."""
    S, T, _ = M.shape
    eps = torch.finfo(M.dtype).eps
    if S * T <= FEW_OF_GRADVAC:
        target_lists = targets.tolist()
        by_segment = zip(M.tolist(), order_keys.expand_as(M).tolist(), target_lists, strict=True)
        coefficients = [_few_of_gradvac(m, k, t, update_mask.tolist(), beta, eps) for m, k, t in by_segment]
        targets.copy_(torch.tensor(target_lists, dtype=torch.float64).view(targets.shape))
        return _like(np.array(coefficients), M)
    rows = _host(M).reshape(S * T, T)
    C, D = _started(rows)
    E = np.abs(rows)  # |C| |M|, the scale of the rounding errors of C M Cᵀ
    task = np.arange(S * T)
    new_targets = _host(targets).reshape(S * T, T)
    moves = np.tile(update_mask.cpu().numpy(), S)
    with np.errstate(all="ignore"):  # invalid entries divide by zero, and are not used
        norms = np.sqrt(rows[task, task % T])
        for partner, row in _partners(order_keys, norms.reshape(S, T), T - 1):
            # A sum of squares counts as 0 if it is within the rounding error of its terms.
            square = np.einsum("ij,ij->i", C, D)
            n, n_j = np.sqrt(square), norms[row]
            valid = (square > eps * np.einsum("ij,ij->i", np.abs(C), E)) & (n_j > 0)
            # φ = cos(g′_i, g_j)
            phi = np.clip(D[task, partner] / n / n_j, -1, 1)
            target = new_targets[task, partner]
            u = np.clip(target, -(1 - eps), 1 - eps)
            # a = ‖g′_i‖ (φ̂ √(1−φ²) − φ √(1−φ̂²)) / (‖g_j‖ √(1−φ̂²))
            root = np.sqrt(1 - u * u)
            a = n * (u * np.sqrt(1 - phi * phi) - phi * root) / (n_j * root)
            corrected = np.flatnonzero(valid & (phi < u))
            a, j, k = a[corrected], row[corrected], partner[corrected]
            C[corrected, k] = a
            D[corrected] += a[:, None] * rows[j]
            E[corrected] += np.abs(a)[:, None] * np.abs(rows[j])
            new_targets[task, partner] = np.where(valid & moves, (1 - beta) * target + beta * phi, target)
    targets.copy_(torch.from_numpy(new_targets).view(targets.shape))
    return _like(C, M)


def _few_of_gradvac(
    M: list[list[float]],
    order_keys: list[list[float]],
    targets: list[list[float]],
    update_mask: list[bool],
    beta: float,
    eps: float,
) -> list[list[float]]:
    """Return the coefficients of one segment, and move ``targets``; names are as in :func:`gradvac`."""
    T = len(M)
    C = []
    for i in range(T):
        c, d, e = [0.0] * T, M[i], [abs(x) for x in M[i]]
        c[i] = 1.0
        for j in _others(order_keys[i], i):
            square = sum(map(mul, c, d))
            if not (square > eps * sum(abs(x) * y for x, y in zip(c, e, strict=True)) and M[j][j] > 0):
                continue
            n, n_j = sqrt(square), sqrt(M[j][j])
            phi = min(max(d[j] / n / n_j, -1.0), 1.0)
            u = min(max(targets[i][j], eps - 1), 1 - eps)
            if phi < u:
                root = sqrt(1 - u * u)
                a = c[j] = n * (u * sqrt(1 - phi * phi) - phi * root) / (n_j * root)
                d = [x + a * y for x, y in zip(d, M[j], strict=True)]
                e = [x + abs(a * y) for x, y in zip(e, M[j], strict=True)]
            if update_mask[i]:
                targets[i][j] = (1 - beta) * targets[i][j] + beta * phi
        C.append(c)
    return C


def _others(keys: list[float], i: int) -> list[int]:
    """Return the other tasks in the order in which task i visits them: by ascending key, equal keys by number."""
    order = sorted(range(len(keys)), key=keys.__getitem__)
    order.remove(i)
    return order


def _host(M: Tensor) -> Floats:
    """Return a float64 copy on the host, which may be written to."""
    return M.detach().to("cpu", torch.float64, copy=True).contiguous().numpy()


def _like(C: Floats, M: Tensor) -> Tensor:
    return torch.from_numpy(C.reshape(M.shape)).to(M)


def _started(rows: Floats) -> tuple[Floats, Floats]:
    """Return C, the modified gradients as combinations, and D = C M, their dot products with the originals."""
    T = rows.shape[1]
    return np.tile(np.eye(T), (len(rows) // T, 1)), rows.copy()


def _partners(order_keys: Tensor, lengths: Floats, visits: int) -> Iterator[tuple[Indices, Indices]]:
    """Yield for each visit the partners of all S x T tasks: their numbers in the segment, and those of their rows.

    Equal order keys are in order of task number, because the sort is stable.

    Args:
        order_keys: (S, T, T) or (1, T, T).
        lengths: (S, T), the lengths of the gradients, or their squares.
        visits: the number of visits. If some partners are not visited, those of length 0 are the first to be left out.
    """
    S, T = lengths.shape
    order: NDArray[Any] = np.argsort(order_keys.detach().cpu().numpy(), axis=-1, kind="stable")
    others = order[order != np.arange(T)[:, None]].reshape(len(order), T, T - 1)
    others = np.broadcast_to(others, (S, T, T - 1))
    if visits < T - 1:
        zeros = lengths[np.arange(S)[:, None, None], others] == 0
        others = np.take_along_axis(others, np.argsort(zeros, axis=-1, kind="stable"), -1)
    for visit in np.moveaxis(others, -1, 0)[:visits]:
        yield visit.reshape(-1), (visit + T * np.arange(S)[:, None]).reshape(-1)

"""Gradient surgery as usually written: on explicit vectors, in their own dtype, one task at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor


def gramian(rows: Sequence[Tensor]) -> Tensor:
    """Return the Gramian (T, T) from T (T + 1) / 2 dot products."""
    T = len(rows)
    M = rows[0].new_empty(T, T)
    for i in range(T):
        for j in range(i, T):
            M[i, j] = M[j, i] = torch.dot(rows[i], rows[j])
    return M


def combine(rows: Sequence[Tensor], w: Tensor) -> Tensor:
    """Return Σ_t w_t g_t."""
    total = torch.zeros_like(rows[0])
    for g, weight in zip(rows, w, strict=True):
        total += weight * g
    return total


def project(rows: Sequence[Tensor], W: Tensor) -> Tensor:
    """Return W J, computed one row at a time."""
    return torch.stack([combine(rows, w) for w in W])


def pcgrad(rows: Sequence[Tensor]) -> Tensor:
    """Return the sum of PCGrad's modified gradients (Yu et al. 2020, Algorithm 1)."""
    modified = [g.clone() for g in rows]
    for i, g in enumerate(modified):
        for j in torch.randperm(len(rows)).tolist():
            if j == i:
                continue
            dot = torch.dot(g, rows[j])
            if dot < 0:
                g -= dot / torch.dot(rows[j], rows[j]) * rows[j]
    return torch.stack(modified).sum(0)


def coefficients(M: Tensor) -> Tensor:
    """Run the same algorithm on a Gramian (T, T); return the modified gradients' coefficients in the original ones."""
    C = torch.eye(len(M), dtype=M.dtype, device=M.device)
    for i, c in enumerate(C):
        for j in torch.randperm(len(M)).tolist():
            if j == i:
                continue
            dot = M[j] @ c
            if dot < 0:
                c[j] -= dot / M[j, j]
    return C


def surgery(grads: Sequence[Sequence[Tensor]], groups: Sequence[Sequence[int]], p: float) -> list[Tensor]:
    """Run PCGrad on the T gradients of n tensors: flatten, modify group by group, mask, and split again.

    Args:
        grads: gradients ``grads[t][k]`` of task t and tensor k.
        groups: indices of the tensors in each group.
        p: probability that an entry is dropped.
    """
    results = list(grads[0])
    for members in groups:
        update = pcgrad([torch.cat([row[k].flatten() for k in members]) for row in grads])
        if p:
            update = update * (torch.rand(len(update), device=update.device) > p)
        parts = update.split([grads[0][k].numel() for k in members])
        for k, part in zip(members, parts, strict=True):
            results[k] = part.view_as(grads[0][k])
    return results


def combined(grads: Sequence[Sequence[Tensor]], w: Tensor, p: float) -> list[Tensor]:
    """Return Σ_t w_t g_t, one tensor at a time, then masked. A single row is returned unweighted.

    ``grads`` and ``p`` are those of ``surgery``.
    """
    results = [g[0] if len(g) == 1 else combine(g, w) for g in zip(*grads, strict=True)]
    return [g * (torch.rand(g.shape, device=g.device) > p) for g in results] if p else results


def gather(grads: Sequence[Sequence[Tensor]], index: Tensor) -> Tensor:
    """Return the entries at ``index`` of the flattened gradients, (T, d)."""
    return torch.stack([torch.cat([g.flatten() for g in row])[index] for row in grads])


def scatter(values: Tensor, index: Tensor, out: Sequence[Tensor]) -> None:
    """Write the values into the tensors ``out`` through a flattened copy of them."""
    flat = torch.cat([g.flatten() for g in out])
    flat[index] = values
    for g, part in zip(out, flat.split([g.numel() for g in out]), strict=True):
        g.copy_(part.view_as(g))

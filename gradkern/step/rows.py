"""The task gradients of a step, read where autograd left them.

Autograd promises no layout: a gradient may be expanded, permuted, sparse, or share its storage with another. One that
lies as its parameter does is read in place; any other is copied to the parameter's strides, that one alone.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradkern.modifiers.suppression import Mask
from gradkern.ops import eager
from gradkern.ops.philox import dropped_at
from gradkern.ops.schema import arithmetic_dtype


@dataclass(frozen=True)
class Column:
    """One parameter's T gradients, None where a task does not reach it.

    Attributes:
        dtype: of the gradients, and so of ``.grad``.
        segment: the parameter's group, or None for one outside surgery, which gets the plain sum.
        unit: the number of the first unit of gradient suppression in it; -1 for one that is never masked.
        sparse: all gradients are sparse COO. Otherwise all are dense, with the strides of a new ``.grad``.
        free: one of the gradients, to be overwritten with the result; None if all are needed elsewhere.
    """

    param: Tensor
    grads: list[Tensor | None]
    dtype: torch.dtype
    segment: int | None
    unit: int
    sparse: bool
    free: Tensor | None

    def result(self) -> Tensor:
        """Memory for the result, laid out as a new ``.grad``: of a gradient if one is free, else new."""
        return torch.empty_like(self.param, dtype=self.dtype) if self.free is None else self.free


def readable(grads: Sequence[Tensor | None], params: Sequence[Tensor]) -> list[Tensor | None]:
    """One task's gradients, those copied that do not lie as a new ``.grad`` would; sparse ones stay as they are.

    To be called pass by pass: then no more than one task's gradients are ever alive beside their copies.
    """
    return [None if g is None else _readable(g, p) for g, p in zip(grads, params, strict=True)]


def columns(
    params: Sequence[Tensor],
    grads: Sequence[Sequence[Tensor | None]],
    segments: Sequence[int | None],
    units: Sequence[int],
    overwrite: bool,
) -> list[Column]:
    """The columns of all parameters that any task reaches.

    Args:
        params: n parameters.
        grads: ``grads[t][k]`` belongs to task t and ``params[k]``; as :func:`readable` gives those of
            :func:`losses.passes`, which copies what somebody else holds.
        segments: the group of each parameter, None outside surgery.
        units: the first unit of suppression of each parameter.
        overwrite: whether nobody needs ``grads`` once they are combined.
    """
    times = Counter(id(g) for row in grads for g in row)
    found = []
    for k, (p, segment) in enumerate(zip(params, segments, strict=True)):
        column = [row[k] for row in grads]
        present = [g for g in column if g is not None]
        if not present:
            continue
        sparse = all(g.is_sparse for g in present)
        if not sparse and any(g.is_sparse for g in present):
            column = [_laid_out(g, p) if g is not None and g.is_sparse else g for g in column]
        unit = -1 if segment is None else units[k]
        free = None
        if overwrite and not sparse:
            free = next((g for g in present if times[id(g)] == 1 and has_its_memory_alone(g)), None)
        found.append(Column(p, column, _grad_dtype(p), segment, unit, sparse, free))
    return found


def has_its_memory_alone(g: Tensor) -> bool:
    """Whether ``g``, which nobody else holds, is no part of a larger tensor, and its memory is PyTorch's."""
    if g.is_sparse:
        return False
    storage = g.untyped_storage()
    return storage.nbytes() == g.nbytes and storage.resizable()


def dense(columns: Sequence[Column]) -> list[Column]:
    """``columns``, sparse gradients made dense."""
    return [
        replace(c, grads=[None if g is None else _laid_out(g, c.param) for g in c.grads], sparse=False)
        if c.sparse
        else c
        for c in columns
    ]


def gramian(columns: Sequence[Column], n_segments: int, mask: Mask | None, outside: bool = False) -> Tensor:
    """(S, T, T), the dot products of the task gradients within each group; float64 if any gradient is.

    Args:
        columns: as :func:`columns` gives them.
        n_segments: S.
        mask: leave out what it drops.
        outside: one more group, (S + 1, T, T), of what is outside surgery.
    """
    if outside:
        columns = [replace(c, segment=n_segments) if c.segment is None else c for c in columns]
        n_segments += 1

    def products(grads: Sequence[Tensor | None], segments: list[int], n: int, units: list[int]) -> Tensor:
        if mask is None:
            return eager.gramian_tensors(grads, segments, n)
        return eager.gramian_masked(grads, segments, n, units, mask.block, mask.words)

    under_surgery = [c for c in columns if c.segment is not None]
    parts = [
        products(row_major(group), [c.segment for c in group if c.segment is not None], n_segments, _units(group))
        for group in _by_dtype([c for c in under_surgery if not c.sparse])
    ]
    dtype = torch.float64 if any(c.dtype == torch.float64 for c in under_surgery) else torch.float32
    if not parts:
        T, device = len(columns[0].grads), columns[0].param.device
        parts = [torch.zeros((n_segments, T, T), dtype=dtype, device=device)]
    M = sum(parts[1:], parts[0]).to(dtype)
    for c in under_surgery:
        if c.sparse:  # dense for as long as its dot products take, one parameter at a time
            grads = [None if g is None else _laid_out(g, c.param) for g in c.grads]
            M[c.segment] += products(grads, [0], 1, [c.unit])[0]
    return M


def combine(
    columns: Sequence[Column], w: Tensor, plain: Tensor | None, mask: Mask | None
) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
    """Each parameter with Σ_t w[segment, t] g_t; one outside surgery with Σ_t plain[t] g_t.

    A result takes the place of one of its gradients where one is free. A head's, without ``plain``, is its one gradient
    itself.

    Args:
        columns: as :func:`columns` gives them.
        w: (S, T), the weights of each group.
        plain: (T,), like ``w``; None for ones.
        mask: what it drops becomes 0.

    Returns:
        The parameters and their results; and the share of the entries that the mask kept, (), None without one. (Of
        dense gradients: the entries that sparse ones lack are dropped anyhow.)
    """
    results = {} if plain is not None else own_gradients(columns)
    summed = [c for c in columns if c.param not in results]
    last = len(w)
    if any(c.segment is None for c in summed):
        w = torch.cat((w, torch.ones_like(w[:1]) if plain is None else plain.unsqueeze(0)))
    kept: list[Tensor] = []
    for group in _by_dtype([c for c in summed if not c.sparse]):
        out = [c.result() for c in group]
        segments = [last if c.segment is None else c.segment for c in group]
        ws = w.to(arithmetic_dtype(out[0].dtype))
        if mask is None:
            eager.combine_tensors(row_major(group), ws, segments, out)
        else:
            units = _units(group)
            kept.append(eager.combine_masked(row_major(group), ws, segments, units, mask.block, mask.words, out))
        results.update(zip((c.param for c in group), out, strict=True))
    for c in summed:
        if c.sparse:
            results[c.param] = _combine_sparse(c, w[last if c.segment is None else c.segment], mask)
    told = share(sum(kept[1:], kept[0]), summed) if kept else None
    return [(c.param, results[c.param]) for c in columns], told


def own_gradients(columns: Sequence[Column]) -> dict[Tensor, Tensor]:
    """Of the heads, whose result is their one gradient itself."""
    alone = [(c, own) for c in columns if (own := only(c)) is not None]
    return {c.param: owned(own, c.param) if c.free is None else own for c, own in alone}


def share(kept: Tensor, columns: Sequence[Column]) -> Tensor | None:
    """Of the entries of dense ``columns`` that a mask may drop; None if there is none."""
    n_masked = sum(c.param.numel() for c in columns if c.unit >= 0 and not c.sparse)
    return kept / n_masked if n_masked else None


def only(c: Column) -> Tensor | None:
    """The gradient of a parameter outside surgery that one task alone reaches."""
    present = [g for g in c.grads if g is not None]
    return present[0] if c.segment is None and len(present) == 1 else None


def _by_dtype(columns: Sequence[Column]) -> list[list[Column]]:
    groups: dict[torch.dtype, list[Column]] = defaultdict(list)
    for c in columns:
        groups[c.dtype].append(c)
    return list(groups.values())


def row_major(columns: Sequence[Column]) -> list[Tensor | None]:
    """The gradients task by task, as the operators take them."""
    return [g for row in zip(*(c.grads for c in columns), strict=True) for g in row]


def _units(columns: Sequence[Column]) -> list[int]:
    return [c.unit for c in columns]


def _combine_sparse(c: Column, w: Tensor, mask: Mask | None) -> Tensor:
    """The entries of all tasks one after another, each scaled; equal indices add up when torch next coalesces."""
    present = [(t, g) for t, g in enumerate(c.grads) if g is not None]
    indices = torch.cat([g._indices() for _, g in present], 1)
    values = torch.cat([torch.where(w[t] == 0, 0.0, w[t] * g._values()).to(g.dtype) for t, g in present])
    if mask is not None and c.unit >= 0:
        units = c.unit + _places(indices, c.param) // mask.block
        values = values.masked_fill(dropped_at(units, mask.words), 0.0)
    return torch.sparse_coo_tensor(indices, values, c.param.shape, check_invariants=False)


def _places(indices: Tensor, p: Tensor) -> Tensor:
    """Where the entries of a sparse gradient lie in the memory of a dense one: of the values' shape."""
    strides = new_grad_stride(p)
    n = len(indices)
    places = sum((i * stride for i, stride in zip(indices, strides[:n], strict=True)), torch.zeros_like(indices[0]))
    for size, stride in zip(p.shape[n:], strides[n:], strict=True):
        places = places.unsqueeze(-1) + stride * torch.arange(size, device=indices.device)
    return places


def added(total: Tensor | None, g: Tensor) -> Tensor:
    """``total + g``, in a new tensor, whichever of them is sparse."""
    if total is None:
        return g
    return g + total if total.is_sparse else total + g  # a sparse tensor cannot take a dense one in


def owned(g: Tensor, p: Tensor) -> Tensor:
    """A copy of ``g`` that nobody else holds, laid out as a new ``.grad`` of ``p``; sparse if ``g`` is."""
    return g.clone() if g.is_sparse else _laid_out(g, p)


def _readable(g: Tensor, p: Tensor) -> Tensor:
    if g.is_sparse:
        return g
    in_place = g.layout == torch.strided and g.stride() == new_grad_stride(p) and g.dtype == _grad_dtype(p)
    return g if in_place and not g.is_neg() else _laid_out(g, p)


def _laid_out(g: Tensor, p: Tensor) -> Tensor:
    return torch.empty_like(p, dtype=_grad_dtype(p)).copy_(g if g.layout == torch.strided else g.to_dense())


def new_grad_stride(p: Tensor) -> tuple[int, ...]:
    """What torch gives a new ``.grad``: the parameter's own strides where it is dense, else a contiguous tensor's."""
    return p.stride() if p.is_contiguous() else torch.empty_like(p, device="meta").stride()


def _grad_dtype(p: Tensor) -> torch.dtype:
    """What ``.grad`` is stored in; since torch 2.10 a parameter may ask for another dtype than its own."""
    return getattr(p, "grad_dtype", None) or p.dtype

"""Task gradients, read where autograd left them.

Autograd promises no layout: a gradient may be expanded, permuted, sparse, or share its storage with another. A gradient
with its parameter's strides is read in place. Any other gradient is copied to the parameter's strides.

A complex gradient is read as pairs of real numbers. For a loss that is real, these are the derivatives with respect to
the real and the imaginary part, so all methods apply to them as to any others.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkern.gradients.layouts import Layouts, Row, fits_in, grad_dtype, new_grad_stride


def readable(row: Row, params: Sequence[Tensor], layouts: Layouts) -> list[Tensor | None]:
    """Return one task's gradients, with copies of those whose layout differs from that of a new ``.grad``.

    Sparse ones stay as they are. Complex ones become pairs of real numbers. Call it after each backward pass, so that
    at most one task's gradients are alive beside their copies.
    """
    if layouts.complex is not None:
        row = [g if g is None else as_real(g) for g in row]
    if layouts.fitting_reach_of(row) is not None:
        return list(row)
    return [
        g if g is None or g.is_sparse or fits_in(g, stride, dtype) else laid_out(g, p)
        for g, p, stride, dtype in zip(row, params, layouts.strides, layouts.dtypes, strict=True)
    ]


def owns_its_storage(g: Tensor) -> bool:
    """Return whether ``g``, a tensor with no other references, fills its storage and PyTorch manages that storage."""
    if g.is_sparse:
        return False
    storage = g.untyped_storage()
    return storage.nbytes() == g.nbytes and storage.resizable()


def added(total: Tensor | None, g: Tensor) -> Tensor:
    """Return ``total + g``, where either may be sparse; ``g`` itself if ``total`` is None."""
    if total is None:
        return g
    return g + total if total.is_sparse else total + g  # torch does not add a dense tensor to a sparse one


def owned(g: Tensor, p: Tensor) -> Tensor:
    """Return a copy of ``g`` with its own memory, laid out as a new ``.grad`` of ``p``; sparse if ``g`` is."""
    return g.clone() if g.is_sparse else laid_out(g, p)


def as_grad(g: Tensor, p: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``g``, a tensor with no other references, or a copy laid out as a new ``.grad`` of ``p`` in ``dtype``."""
    fits = fits_in(g, new_grad_stride(p), dtype) and owns_its_storage(g)
    return g if fits else laid_out(g, p)


def laid_out(g: Tensor, p: Tensor) -> Tensor:
    """Return a dense copy of ``g``, laid out as a new ``.grad`` of ``p``; complex if ``g`` is."""
    memory = new_grad(p, grad_dtype(p))
    memory = torch.view_as_complex(memory) if g.is_complex() else memory
    return memory.copy_(g if g.layout == torch.strided else g.to_dense())


def new_grad(p: Tensor, dtype: torch.dtype) -> Tensor:
    """Return memory for a new ``.grad`` of ``p`` in a real dtype: that of its pairs of numbers if ``p`` is complex."""
    if p.is_complex():
        return torch.view_as_real(torch.empty_like(p, dtype=dtype.to_complex()))
    return torch.empty_like(p, dtype=dtype)


def as_real(g: Tensor) -> Tensor:
    """Return ``g``, or the pairs of real numbers of a complex one, which is made dense."""
    return torch.view_as_real(g.to_dense().resolve_conj()) if g.is_complex() else g

"""The operators, each declared once: signature, contract, and the shape of the result.

``J`` is a matrix (T, P) with unit column stride. ``offsets`` is an int64 tensor on the CPU, (S + 1,): segment s is the
columns ``offsets[s]:offsets[s + 1]``. Arithmetic is float64 for float64 input and float32 for all others; Gramians and
weights have that dtype. Overloads ``tensors`` take gradients that stay where autograd put them.

``kept``, int64 of no dimension, grows by the number of entries of masked parameters that a mask keeps.

``order_keys`` give an order of partners: task i visits the others in ascending order of ``order_keys[..., i, :]``;
equal keys are in order of task number. The keys are floating, (S, T, T), or (1, T, T) for all segments alike.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkern.ops.arguments import (
    AdamWState,
    AdamWStep,
    Coins,
    Mask,
    OptionalTensors,
    ProjectionArguments,
    TaskGrads,
    sample,
)
from gradkern.ops.dtypes import arithmetic_dtype
from gradkern.ops.registry import operator


@operator("gramian")
def gramian(J: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Compute M = J Jᵀ, (T, T), or (S, T, T) with one for each segment."""
    return J.new_empty((*_segments(offsets), J.shape[0], J.shape[0]), dtype=arithmetic_dtype(J.dtype))


@operator("cross")
def cross(A: Tensor, B: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Compute A Bᵀ, the dot products of two matrices' rows, (T, R), or (S, T, R)."""
    return A.new_empty((*_segments(offsets), A.shape[0], B.shape[0]), dtype=arithmetic_dtype(A.dtype))


@operator("combine")
def combine(J: Tensor, w: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Compute wᵀ J, (P,), in J's dtype; ``w`` is (T,), or (S, T). A row whose weight is 0 is not read."""
    return J.new_empty(J.shape[1])


@operator("combine.out", writes=("out",))
def combine_out(J: Tensor, w: Tensor, offsets: Tensor | None, out: Tensor) -> None:
    """Write the result of ``combine`` to ``out``, contiguous, which shares no memory with the other tensors."""


@operator("project")
def project(J: Tensor, W: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Compute W J, (R, P), in J's dtype; ``W`` is (R, T), or (S, R, T)."""
    return J.new_empty((W.shape[-2], J.shape[1]))


@operator("gramian.tensors")
def gramian_tensors(rows: TaskGrads, mask: Mask | None = None) -> Tensor:
    """Compute the Gramian of each segment, (S, T, T), over the entries that the mask keeps."""
    like = sample(rows.grads)
    return like.new_empty((rows.n_segments, rows.n_tasks, rows.n_tasks), dtype=arithmetic_dtype(like.dtype))


@operator("cross.tensors")
def cross_tensors(rows: TaskGrads, others: OptionalTensors, mask: Mask | None = None) -> Tensor:
    """Compute the dot products of the rows with R others, (S, T, R), over the entries that the mask keeps.

    ``others`` are R x n tensors of the same parameters, row-major, as the gradients of ``rows`` are.
    """
    like, R = sample(rows.grads), len(others) // len(rows.segments)
    return like.new_empty((rows.n_segments, rows.n_tasks, R), dtype=arithmetic_dtype(like.dtype))


@operator("combine.tensors", writes=("out", "kept"))
def combine_tensors(
    rows: TaskGrads, w: Tensor, out: Sequence[Tensor], mask: Mask | None = None, kept: Tensor | None = None
) -> None:
    """Write Σ_t w[s, t] grads[t, k] to ``out[k]``, s the segment of k, and 0 where the mask drops; ``w`` is (S, T).

    ``out[k]`` may be one of the gradients of parameter k. A gradient whose weight is 0 is not read.
    """


@operator("gather")
def gather(grads: OptionalTensors, numels: Sequence[int], index: Tensor) -> Tensor:
    """Return the entries at ``index``, (T, d), in arithmetic dtype.

    ``index`` (d,), int64 on the device, holds ascending positions in the n parameters one after another, ``numels[k]``
    elements each; ``grads`` is T x n, row-major.
    """
    like = sample(grads)
    return like.new_empty((len(grads) // len(numels), index.shape[0]), dtype=arithmetic_dtype(like.dtype))


@operator("scatter", writes=("out",))
def scatter(values: Tensor, numels: Sequence[int], index: Tensor, out: Sequence[Tensor]) -> None:
    """Write ``values`` (d,) to the entries at ``index`` of ``out``; skip tensors of no size."""


@operator("pcgrad")
def pcgrad(M: Tensor, order_keys: Tensor | None, partner: str) -> Tensor:
    """Compute PCGrad's coefficients, (S, T, T): row i combines the gradients into the modified one of task i.

    ``partner``, one of ``partners.PARTNERS``, selects the tasks that a task visits: "all", or only the first, "random".
    The others take no keys, because they follow from M: the task with the largest or the smallest cosine,
    "most_similar" or "most_different", the first of equals; or the "average" of all, each projecting the original
    gradient. A task whose gradient is zero is nobody's partner: it is not chosen, and is not in the average.
    """
    return torch.empty_like(M, memory_format=torch.contiguous_format)


@operator("pcgrad.matrix")
def pcgrad_matrix(J: Tensor, order_keys: Tensor | None, partner: str, mean: bool) -> Tensor:
    """Compute PCGrad's update (P,) of a matrix: the sum of its modified rows, or their mean."""
    return J.new_empty(J.shape[1])


@operator("pcgrad.matrix_out", writes=("out",))
def pcgrad_matrix_out(J: Tensor, order_keys: Tensor | None, partner: str, mean: bool, out: Tensor) -> None:
    """Write the result of ``pcgrad.matrix`` to ``out``, as ``combine.out`` does."""


@operator("gradvac", writes=("targets",))
def gradvac(
    M: Tensor,
    order_keys: Tensor,
    targets: Tensor,
    update_mask: Tensor,
    beta: float,
    eps: Sequence[float] | None = None,
) -> Tensor:
    """Compute GradVac's coefficients, (S, T, T), and move its targets.

    ``targets`` (S, T, T) are float64. Those of task i move where ``update_mask`` (T,) is true for i. ``eps`` is the
    spacing of numbers at 1 in the arithmetic of each segment's rows, S numbers; None if it is that of M's dtype.
    """
    return torch.empty_like(M, memory_format=torch.contiguous_format)


@operator("surgery", writes=("out", "targets", "kept"))
def surgery(
    rows: TaskGrads,
    method: ProjectionArguments,
    out: Sequence[Tensor],
    mask: Mask | None = None,
    products_masked: bool = False,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Do the whole surgery: return the Gramians (S, T, T) and weights (S, T), and write the combination to ``out``.

    A parameter of segment -1 is unshared: its gradients are added up, and are in no Gramian. Dot products are over the
    kept entries if ``products_masked``, else over all. ``out[k]`` may be a gradient of parameter k that shares its
    memory with no other tensor.
    """
    like = sample(rows.grads)
    M = like.new_empty((rows.n_segments, rows.n_tasks, rows.n_tasks), dtype=arithmetic_dtype(like.dtype))
    return M, torch.empty_like(M[:, 0])


@operator("surgery.blocks", writes=("targets",))
def surgery_blocks(blocks: Sequence[Tensor], method: ProjectionArguments) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Do the whole surgery of S segments' matrices: return Gramians (S, T, T), weights (S, T), and S combinations."""
    T = blocks[0].shape[0]
    M = blocks[0].new_empty((len(blocks), T, T), dtype=arithmetic_dtype(blocks[0].dtype))
    return M, torch.empty_like(M[:, 0]), [block.new_empty(block.shape[1]) for block in blocks]


@operator("graddrop", writes=("out", "kept"))
def graddrop(
    rows: TaskGrads,
    coins: Coins,
    coefficients: Tensor | None,
    out: Sequence[Tensor],
    mask: Mask | None = None,
    kept: Tensor | None = None,
) -> None:
    """Write to each entry of ``out`` the sum of the gradients of one sign there, and 0 where the mask drops.

    Let P be the sum of the positive gradients of an entry and N that of the negative ones' absolute values, each added
    up from the first row to the last in arithmetic dtype. The positive ones are chosen where coin (P + N) < P, else the
    negative ones.

    ``coefficients`` (2, T) multiply the gradients that are chosen, and those that are not; None for ones and zeros.
    Where a row's first coefficient is 0, its gradients that are not finite count as zeros. Any other one, and a P + N
    that overflows, makes NaN of the entry. ``out[k]`` may be one of the gradients of parameter k.
    """


@operator("trimmed_mean", writes=("out", "kept"))
def trimmed_mean(
    rows: TaskGrads,
    k: int,
    weights: Tensor | None,
    out: Sequence[Tensor],
    mask: Mask | None = None,
    kept: Tensor | None = None,
) -> None:
    """Write to each entry of ``out`` the mean of the T gradients there without the k largest and the k smallest.

    T is more than 2 k. ``weights`` (T,) multiply the others, None for ones; they do not change what is left out, nor
    the number that the sum is divided by. The earlier one of equal gradients counts as the larger. Where a row's weight
    is 0, its gradients that are not finite count as zeros. Any other one makes NaN of the entry. The result is 0 where
    the mask drops. ``out[k]`` may be one of the gradients of parameter k.
    """


@operator("active_set")
def active_set(K: Tensor, R: Tensor, free: Tensor, square: Tensor | None = None) -> Tensor:
    """Solve convex problems with bounds, exactly: ``gradkern/aggregators/solvers/active_set.py`` says which.

    ``K`` (..., T, T), ``R`` (..., T, 1), or (..., T, 2) with ``square`` (...), are float64, and ``free`` (..., T) is
    bool. Leading dimensions are independent problems; those of ``K`` and ``free`` broadcast to those of ``R``. The
    result is (..., T).
    """
    return torch.empty_like(R[..., 0], memory_format=torch.contiguous_format)


@operator("fair")
def fair(K: Tensor, a: Tensor, gamma: float) -> Tensor:
    """Compute v > 0 with K v = a v^(-gamma), as ``gradkern/aggregators/solvers/fair.py`` explains.

    ``K`` (..., T, T) and ``a`` (..., T) are float64; ``a`` broadcasts. The result is (..., T).
    """
    return torch.empty_like(K[..., 0], memory_format=torch.contiguous_format)


@operator("jacobi")
def jacobi(M: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the eigenvalues (..., T), in no order, and the eigenvectors (..., T, T), as columns.

    ``M`` (..., T, T) is float64, symmetric and finite.
    """
    return torch.empty_like(M[..., 0], memory_format=torch.contiguous_format), torch.empty_like(
        M, memory_format=torch.contiguous_format
    )


@operator("adamw", writes=("params", "moments", "kept"))
def adamw(
    rows: TaskGrads,
    w: Tensor,
    state: AdamWState,
    step: AdamWStep,
    mask: Mask | None = None,
    kept: Tensor | None = None,
) -> None:
    """Take the step of torch.optim.AdamW along the result of ``combine.tensors``, which is never stored."""


def _segments(offsets: Tensor | None) -> tuple[int, ...]:
    return () if offsets is None else (offsets.shape[0] - 1,)

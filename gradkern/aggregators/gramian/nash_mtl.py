"""Nash-MTL (Navon et al. 2022, "Multi-Task Learning as a Bargaining Game").

The tasks bargain about the update d, and the gain of task i is g_iᵀd. The product of the gains is the largest for
d = Σ w_i g_i with M w = 1/w, w > 0, up to d's length. M is divided by its Frobenius norm first, so that d grows as the
gradients do, and then d's length is cut. :mod:`gradkern.aggregators.solvers.fair` solves the equations by Newton's
method; the authors and TorchJD by a sequence of convex programs on the host, which ends before it is exact.

The authors' programs contain the norm, too, and undo the division: they solve M w = 1/w, whose update is √T long. So
theirs is always cut to 1 by default, and the update here only if it is longer. The directions are the same.
"""

import torch
from torch import Tensor

from gradkern.aggregators.base import all_finite, has_numbers
from gradkern.aggregators.gramian.base import GramianMethod
from gradkern.aggregators.solvers.arrays import Array, carried, none, space
from gradkern.aggregators.solvers.fair import fair
from gradkern.aggregators.task_state import TaskState
from gradkern.arguments import integer, number, shown


class NashMTL(GramianMethod, TaskState):
    """Nash-MTL of Navon et al. 2022: the weights w > 0 with (M / ‖M‖) w = 1/w, to 1e-9; ‖M‖ is the Frobenius norm.

    The update is longest along directions in which all tasks gain alike, relative to the lengths of their gradients. A
    gradient of zero is left out and gets the weight 0. If 0 is in the hull of the gradients, the equations have no
    solution. Then 1e-6 M_ii is added to each M_ii, which bounds the weights.

    With ``update_every`` above 1 the last weights are state, in ``state_dict``. Each group has its own. A step whose
    Gramian is not finite changes nothing of it, because a gradient scaler will skip it. A CPU saves the solution in the
    steps between. A device may not be read: there every step solves the equations, and uses the result if it is due.

    Args:
        max_norm: the largest length of the update of a group, above 0; None for no limit.
        update_every: the number of steps for which weights are used, at least 1. A task that is present and has no
            weight yet, because it was absent, makes new ones due.

    Attributes:
        last: (S, T) float64, the last weights of each group before the cut; None before the first step, and with
            ``update_every=1``.
        age: (S, T) float64, the number of steps that they have served.
    """

    kept = ("last", "age")
    last: Tensor | None
    age: Tensor | None

    def __init__(self, max_norm: float | None = 1.0, update_every: int = 1) -> None:
        super().__init__()
        self.max_norm = None if max_norm is None else number("max_norm", max_norm, above=0)
        self.update_every = integer("update_every", update_every, 1)

    def _solve(self, M: Tensor, present: Tensor | None, eps: float | Tensor) -> Tensor:
        if self.update_every == 1:
            return _bargained(M, present, self.max_norm)
        T = M.shape[-1]
        flat = M.detach().reshape(-1, T, T).double()
        if present is not None:
            flat = flat.masked_fill(~(present.unsqueeze(-1) & present), 0.0)
        w = self._scheduled(flat, present)
        return w.view(M.shape[:-1]) if self.max_norm is None else _cut(flat, w, self.max_norm).view(M.shape[:-1])

    def _scheduled(self, M: Tensor, present: Tensor | None) -> Tensor:
        """Return the weights of this step, (S, T), before the cut; keep them."""
        last, age = (self._kept_for(name, M, 0.0) for name in self.kept)
        rows = M.diagonal(dim1=-2, dim2=-1) != 0
        due = (age % self.update_every == 0).all(-1) | (rows & (last == 0)).any(-1)
        finite = all_finite(M)
        w = _renewed(M, present, last, due)
        if present is not None:
            w = torch.where(present, w, 0.0)
        w = torch.where(finite.unsqueeze(-1), w, torch.nan)
        counts, due = finite.all(), due.unsqueeze(-1)  # a scaler skips the step of all groups
        self._keep("last", M, torch.where(counts & due, w, last))
        self._keep("age", M, torch.where(counts, torch.where(due, 1.0, age + 1), age))
        return w

    def _loadable(self, name: str, loaded: object) -> Tensor:
        numbers = super()._loadable(name, loaded)
        if has_numbers(numbers) and not bool((numbers.isfinite() & (numbers >= 0)).all()):
            raise ValueError(f"{name} in state_dict must be finite and at least 0, got {shown(numbers.tolist())}")
        return numbers

    def __repr__(self) -> str:
        return f"NashMTL(max_norm={self.max_norm}, update_every={self.update_every})"


def _of_unit_norm(M: Array, among: Array | None) -> Array:
    """Return the weights w with (M / ‖M‖) w = 1/w."""
    xp = space(M)
    if among is not None:
        M = xp.where(among[..., None] & among[..., None, :], M, 0.0)
    largest = xp.amax(abs(M), (-2, -1))[..., None]
    unit = M / xp.where(largest > 0, largest, 1.0)[..., None]
    return fair(M, 1.0, 1.0, among) * (largest * (unit * unit).sum((-2, -1))[..., None] ** 0.5) ** 0.5


def _limited(M: Array, w: Array, max_norm: float) -> Array:
    """Return w, or a multiple of it whose update is ``max_norm`` long. M is 0 where a task is absent."""
    length = (w * (M @ w[..., None])[..., 0]).sum(-1)[..., None].clip(0) ** 0.5
    return w * (max_norm / length.clip(max_norm))


@carried
def _bargained(M: Array, among: Array | None, max_norm: float | None) -> Array:
    w = _of_unit_norm(M, among)
    if max_norm is None:
        return w
    if among is not None:
        M = space(M).where(among[..., None] & among[..., None, :], M, 0.0)
    return _limited(M, w, max_norm)


@carried
def _renewed(M: Array, among: Array | None, kept: Array, due: Array) -> Array:
    """Return new weights where they are due, and else the kept ones."""
    if none(due):
        return kept.copy()
    return space(M).where(due[..., None], _of_unit_norm(M, among), kept)


_cut = carried(_limited)

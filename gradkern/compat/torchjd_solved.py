"""TorchJD's weightings that solve a small problem, with gradkern's solvers in place of solver libraries.

Each takes TorchJD's arguments and means by them what TorchJD does. The solution is exact, on the Gramian's device, and
no number is read by the host. ``gradkern.compat.torchjd`` imports them, and its docstring names the differences.
"""

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import torchjd.aggregation as theirs
from torch import Tensor
from torchjd.linalg import DualConeProjector, PSDMatrix
from torchjd.linalg import QuadprogProjector as TheirProjector

from gradkern.aggregators.base import check_gramian
from gradkern.aggregators.gramian.pcd import constrained
from gradkern.aggregators.solvers.active_set import nonnegative
from gradkern.aggregators.solvers.arrays import Array, ascending, carried, identity, lowest, space
from gradkern.aggregators.solvers.ball import best_in_ball
from gradkern.aggregators.solvers.eigen import pseudo_inverse
from gradkern.aggregators.solvers.fair import fair
from gradkern.aggregators.solvers.scaling import mean_weights
from gradkern.arguments import integer, number
from gradkern.ops import gramian
from gradkern.ops.dtypes import arithmetic_dtype


def computable(M: Tensor) -> Tensor:
    """Return a Gramian in the dtype that the methods take. autogram gives it in the model's dtype."""
    M = M.to(arithmetic_dtype(M.dtype))
    check_gramian(M)
    return M


class QuadprogProjector(TheirProjector):
    """TorchJD's QuadprogProjector without quadprog: the same problem, solved by gradkern on the Gramian's device.

    Args:
        norm_eps: a Gramian whose trace is smaller counts as zero.
        reg_eps: what is added to the diagonal of the Gramian divided by its trace.
    """

    _REQUIRED_DEPS: ClassVar[list[str]] = []  # type: ignore[misc]

    def __call__(self, U: Tensor, G: Tensor) -> Tensor:
        """Return the weights of the projections of the rows of U (..., T), in the dtype of the Gramian G (T, T)."""
        return _projected(computable(G), U, self.norm_eps, self.reg_eps).to(G.dtype)


class _Projecting:
    """The projector of a weighting: gradkern's if none is given."""

    @property
    def projector(self) -> DualConeProjector:
        """The solver of the projections."""
        return self._projector

    @projector.setter
    def projector(self, value: DualConeProjector | None) -> None:
        self._projector = QuadprogProjector() if value is None else value


class UPGradWeighting(_Projecting, theirs.UPGradWeighting):
    """TorchJD's UPGradWeighting, solved by gradkern unless a projector is given."""


class DualProjWeighting(_Projecting, theirs.DualProjWeighting):
    """TorchJD's DualProjWeighting, solved by gradkern unless a projector is given."""


class CAGradWeighting(theirs.CAGradWeighting):
    """TorchJD's CAGradWeighting, solved by gradkern."""

    _REQUIRED_DEPS: ClassVar[list[str]] = []  # type: ignore[misc]

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Return the weights (T,) of a Gramian (T, T), in its dtype."""
        return _cagrad(computable(gramian), float(self.c), float(self.norm_eps)).to(gramian.dtype)


class FairGradWeighting(theirs.FairGradWeighting):
    """TorchJD's FairGradWeighting, solved by gradkern.

    Args:
        alpha: the kind of fairness, at least 0.
        max_iters: kept, but without effect.
    """

    _REQUIRED_DEPS: ClassVar[list[str]] = []  # type: ignore[misc]

    @property
    def alpha(self) -> float:
        """The kind of fairness."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        number("alpha", value, least=0)
        self._alpha = value

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Return the weights (T,) of a Gramian (T, T), in its dtype."""
        M = computable(gramian)
        return (_mean(M) if self.alpha == 0 else _fair(M, float(self.alpha))).to(gramian.dtype)


class IMTLGWeighting(theirs.IMTLGWeighting):
    """TorchJD's IMTLGWeighting, computed in float64."""

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Return the weights (T,) of a Gramian (T, T), in its dtype."""
        M = computable(gramian)
        return _imtlg(M, torch.finfo(M.dtype).eps).to(gramian.dtype)


class KrumWeighting(theirs.KrumWeighting):
    """TorchJD's KrumWeighting, computed in float64."""

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Return the weights (T,) of a Gramian (T, T), in its dtype."""
        self._check_matrix_shape(cast(PSDMatrix, gramian))
        return _krum(computable(gramian), self.n_byzantine, self.n_selected).to(gramian.dtype)


class PCDWeighting(theirs.PCDWeighting):
    """TorchJD's PCDWeighting, solved by gradkern on the Gramian's device, where the running means are kept too."""

    _sq_norm_ema: Tensor | None  # type: ignore[assignment]  # TorchJD declares them as None only
    _n_steps: Tensor | None  # type: ignore[assignment]

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Return the weights (T,) of a Gramian (T, T), in its dtype. A new number of tasks starts without means."""
        M = computable(gramian)
        T = len(M)
        tau = self.tau
        if isinstance(tau, Tensor):
            tau = torch.nn.functional.pad(self._get_taus(T), (1, 0)).to(M.device, non_blocking=True)
        self._ensure_state(T)
        assert self._sq_norm_ema is not None
        assert self._n_steps is not None
        means, steps = (x.to(M.device, torch.float64).expand(T) for x in (self._sq_norm_ema, self._n_steps))
        precision = 10 * torch.finfo(gramian.dtype).eps
        w, means, steps = _pcd(M, means, steps, tau, float(self.beta), float(self.eps), precision).unbind()
        self._sq_norm_ema, self._n_steps = means, steps[0].long()
        return w.to(gramian.dtype)


class _Checked:
    """An attribute whose values are checked when they are set."""

    def __init__(self, check: Callable[[str, Any], Any]) -> None:
        self.check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, one: Any, owner: type) -> Any:
        return self if one is None else one.__dict__[f"_{self.name}"]

    def __set__(self, one: Any, value: object) -> None:
        one.__dict__[f"_{self.name}"] = self.check(self.name, value)


class NashMTLWeighting(theirs.Weighting[Tensor]):
    """The weights of TorchJD's NashMTL, solved by gradkern.

    Args:
        n_tasks: the number of rows of the matrices.
        max_norm: the length that updates are cut to; 0 for none.
        update_weights_every: the number of calls that share one solution.
        optim_niter: checked and kept, but without effect.
    """

    n_tasks = _Checked(lambda name, value: integer(name, value, 1))
    max_norm = _Checked(lambda name, value: number(name, value, least=0))
    update_weights_every = _Checked(lambda name, value: integer(name, value, 1))
    optim_niter = _Checked(lambda name, value: integer(name, value, 1))

    def __init__(self, n_tasks: int, max_norm: float, update_weights_every: int, optim_niter: int) -> None:
        super().__init__()
        self.n_tasks, self.max_norm = n_tasks, max_norm
        self.update_weights_every, self.optim_niter = update_weights_every, optim_niter
        self.reset()

    def reset(self) -> None:
        """Begin again, with weights of 1 and a solution in the next call."""
        self.step = 0
        self.prvs_alpha = torch.ones(self.n_tasks, dtype=torch.float64, device="cpu")

    @torch.no_grad()
    def forward(self, matrix: Tensor, /) -> Tensor:
        """Return the weights (T,) of a matrix (T, P). They solve (M / ‖M‖) w = 1 / w for its Gramian M."""
        M = gramian(matrix)
        if len(M) != self.n_tasks:
            raise ValueError(f"matrix must have n_tasks={self.n_tasks} rows, got {tuple(matrix.shape)}")
        w = self.prvs_alpha.to(M.device, non_blocking=True)
        if self.step % self.update_weights_every == 0:
            solution = _nash(M)
            self.prvs_alpha = torch.where(solution.isfinite().all(), solution, w)  # an overflow is not remembered
            w = solution
        self.step += 1
        if self.max_norm > 0:
            length = (w @ M.double() @ w).clamp(0).sqrt()
            w = torch.where(length > self.max_norm, w * (self.max_norm / length), w)
        return w.to(M.dtype)


_fair = carried(fair)
_mean = carried(mean_weights)


@carried
def _projected(M: Array, U: Array, norm_eps: float, reg_eps: float) -> Array:
    xp = space(M)
    trace = M.diagonal().sum(-1)
    G = xp.where((trace < norm_eps) | (trace == 0), 0.0, M / trace) + reg_eps * identity(M)
    return nonnegative(G, U @ G) + U


@carried
def _cagrad(M: Array, c: float, norm_eps: float) -> Array:
    xp = space(M)
    e = mean_weights(M)
    y = best_in_ball(M, e, c)
    trace, total = M.diagonal().sum(-1), y.sum(-1)
    length = xp.sqrt((y * (M @ y)).sum(-1).clip(0) / trace) / total  # of the combination with weights of sum 1
    return xp.where((trace < norm_eps) | ((total > 0) & (length < norm_eps)), 0.0, e + y)


@carried
def _krum(M: Array, n_byzantine: int, n_selected: int) -> Array:
    square = M.diagonal()
    distances = space(M).sqrt((square[:, None] + square - 2 * M).clip(0))
    score = ascending(distances)[:, 1 : len(M) - n_byzantine - 1].sum(-1)  # the first is that to itself
    return space(M).ones_like(score) * lowest(score, n_selected) / n_selected


@carried
def _pcd(M: Array, means: Array, steps: Array, tau: Array | float, beta: float, eps: float, precision: float) -> Array:
    """Return the weights, and the running means and the number of steps after this one: (3, T)."""
    xp = space(M)
    new = beta * means + (1 - beta) * M.diagonal()
    lengths = xp.sqrt(new / (1 - beta ** (steps + 1)) + eps)
    finite = xp.isfinite(M).all()
    w = xp.where(finite, constrained(M, None, lengths, tau, precision), xp.nan)
    return xp.stack((w, xp.where(finite, new, means), xp.where(finite, steps + 1, steps)), 0)


@carried
def _imtlg(M: Array, eps: float) -> Array:
    w = pseudo_inverse(M, space(M).sqrt(M.diagonal()), eps)
    total = w.sum(-1)
    return space(M).where(abs(total) < 1e-12, 0.0, w / total)


@carried
def _nash(M: Array) -> Array:
    norm = space(M).sqrt((M * M).sum())
    return fair(M / space(M).where(norm > 0, norm, 1.0))

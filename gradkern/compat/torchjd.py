"""TorchJD's aggregators on gradkern: import them from ``gradkern.compat.torchjd`` in place of ``torchjd.aggregation``.

Every name of ``torchjd.aggregation`` is here, with its arguments, attributes and ``repr``. The classes defined here
derive from TorchJD's, so aggregators work in ``torchjd.autojac``, and weightings in ``torchjd.autogram``. The work is
divided as follows:

- ``PCGrad`` and ``GradVac``, with their weightings, run on gradkern entirely. Orders are drawn as TorchJD draws them,
  so equal seeds give equal steps.
- ``CAGrad``, ``DualProj``, ``FairGrad``, ``IMTLG``, ``Krum``, ``NashMTL``, ``PCD`` and ``UPGrad``, with their
  weightings, run on gradkern entirely too. Its solvers are exact, work on the device, and need none of the libraries
  that TorchJD's need: quadprog, qpsolvers, cvxpy, Clarabel, ECOS, SciPy. ``UPGrad`` and ``DualProj`` take a
  ``projector`` of yours as it is. In place of TorchJD's ``QuadprogProjector(norm_eps=, reg_eps=)`` there is one here,
  of the same name.
- ``AlignedMTL`` and ``MGDA`` compute Gramian and combination on gradkern, and take TorchJD's weights, which need no
  other library. So does an aggregator of yours that derives from ``GramianWeightedAggregator``. Autograd differentiates
  TorchJD's weights, and gradkern's have no derivative. TorchJD's MGDA is not exact either: it ends after the rounds of
  Frank and Wolfe that ``epsilon`` and ``max_iters`` allow. :class:`gradkern.MGDA` is exact.
- Everything else is TorchJD's, unchanged, and needs no other library either. ``ConFIG`` and ``ExcessMTL`` have no
  Gramian. ``GradDrop`` draws from torch's generator. ``TrimmedMean`` has a derivative, and leaves infinite gradients
  out. ``MoDo`` and ``SDMGrad`` take a second batch. ``Sum``, ``Mean``, ``Constant`` and ``Random`` have fixed or random
  weights, whose one product with the gradients could not be faster.

:class:`gradkern.SurgeryOptimizer` takes gradkern's own methods. If it is given one of these, its error names the twin.

Results equal TorchJD's up to rounding, with these exceptions:

- Gramians of 16-bit gradients are float32, and so are the weights that follow from them. TorchJD's have 8 or 11 bits
  and overflow. The combination is rounded once.
- A gradient whose weight is 0 is not read. If it is not finite, and Krum has left it out, it leaves no NaN behind.
- ``PCGrad`` and ``GradVac`` compute the weights in float64.
- No gradient is projected onto one whose square is 0. TorchJD's ``PCGrad`` divides by that square. ``GradVac`` skips
  the pairs of such a gradient and does not move their targets. TorchJD moves the targets toward 0 and gives the
  gradient weights about 1e8 times as large as others, by which autogram then scales that loss.
- ``GradVac``'s ``eps`` has no effect. TorchJD adds it to denominators, so cosines of gradients that are not long
  compared with it are too small: by half for lengths of 1e-4.
- ``GradVac`` aims at a cosine of 1 - √ε at most, ε = 1.2e-7 in float32 and 2.2e-16 in float64; see
  :mod:`gradkern.aggregators.gradvac`. Tasks whose gradients stay equal for dozens of steps reach a target of 1. In the
  first step in which they differ, TorchJD gives them weights of up to 1e8, and this class up to 38 or 5800.
- A step that is not finite does not change ``GradVac``'s targets. TorchJD's are NaN from then on, and correct nothing.
- ``GradVac``'s targets are float64, on the device of the Gramian, and are kept if the dtype changes. Checkpoints load
  into fresh instances. They are exchangeable with TorchJD's, which load into instances that have made a step.
- TorchJD's ``CAGrad`` stops where Clarabel does, up to 1e-3 of the update away from the best one. Its ``NashMTL`` stops
  when the equations hold to 1e-3, or after ``optim_niter`` rounds, and its ``FairGrad`` after ``max_iters``. Here the
  equations hold to rounding, so ``optim_niter`` and ``max_iters`` have no effect.
- If 0 is in the hull of the gradients, or one is zero, the equations of ``NashMTL`` and ``FairGrad`` have no solution.
  TorchJD returns what its solver ends with. Here a zero row gets the weight 0, and for the other case see
  :mod:`gradkern.aggregators.solvers.fair`. ``FairGrad`` with ``alpha`` below 0 is an error.
- Where rounding decides, as between equal scores of ``Krum`` or constraints of ``PCD`` that are hardly possible to
  meet together, the decision may be another one. ``PCD``'s running means are on the device of the Gramian.
- Gradients that are not finite give weights that are not a number, where TorchJD's solvers raise. ``NashMTL`` does not
  remember such weights.
- A matrix of integers, of complex numbers or that is sparse is an error, whose message names the conversion:
  ``J.float()``, ``torch.view_as_real(J).flatten(1)`` or ``J.to_dense()``.
- A matrix of no rows is an error, and so is capture in a CUDA graph, which would repeat orders drawn on the host.

Gramian and combination take some 20 to 50 µs more, in one call, than two products of small matrices. The methods with
TorchJD's weights are therefore slower than in TorchJD for gradients of 10⁴ numbers, and faster for 10⁶.
"""

from typing import Any, cast

import torch
from torch import Tensor

from gradkern.ops import combine, gramian, operators
from gradkern.ops.capture import capturing
from gradkern.ops.devices import GPU

try:
    import torchjd.aggregation as theirs
except ImportError as error:
    raise ImportError("gradkern.compat.torchjd needs TorchJD: pip install 'torchjd>=0.18'") from error
from torchjd.linalg import DualConeProjector, PSDMatrix

from gradkern.compat.torchjd_solved import (
    CAGradWeighting,
    DualProjWeighting,
    FairGradWeighting,
    IMTLGWeighting,
    KrumWeighting,
    NashMTLWeighting,
    PCDWeighting,
    UPGradWeighting,
    computable,
)
from gradkern.compat.torchjd_solved import (
    QuadprogProjector as QuadprogProjector,
)

__all__ = theirs.__all__


def __getattr__(name: str) -> Any:
    """Return TorchJD's object of this name, from the release that is installed."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(theirs, name)


class GramianWeightedAggregator(theirs.GramianWeightedAggregator):
    """TorchJD's GramianWeightedAggregator, with Gramian and combination on gradkern."""

    def __init__(self, gramian_weighting: theirs.Weighting[PSDMatrix]) -> None:
        super().__init__(gramian_weighting)
        self.weighting = gramian_weighting << _gramian

    @staticmethod
    def _combine(matrix: Tensor, weights: Tensor) -> Tensor:
        return combine(matrix, weights)


class PCGradWeighting(theirs.PCGradWeighting):
    """TorchJD's PCGradWeighting, computed in float64 on the Gramian's device: see :class:`gradkern.PCGrad`."""

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Return the weights (T,) of a Gramian (T, T), in its dtype."""
        M = computable(gramian)
        T = len(M)
        keys = _keys(torch.stack([_permutation(T) for _ in range(T)]), M.device)
        return operators.pcgrad(M.unsqueeze(0), keys, "all")[0].sum(0).to(gramian.dtype)


class PCGrad(theirs.PCGrad, GramianWeightedAggregator):
    """TorchJD's PCGrad, on gradkern."""

    def __init__(self) -> None:
        GramianWeightedAggregator.__init__(self, PCGradWeighting())


class GradVacWeighting(theirs.GradVacWeighting):
    """TorchJD's GradVacWeighting, computed in float64 on the Gramian's device: see :class:`gradkern.GradVac`.

    Args:
        beta: how far a target moves toward the cosine in a step, from 0 to 1.
        eps: checked and kept, but without effect.
    """

    _phi_t: Tensor | None  # type: ignore[assignment]  # TorchJD declares it as None only

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Return the weights (T,) of a Gramian (T, T), in its dtype. A new number of tasks starts from targets of 0."""
        M = computable(gramian)
        T = len(M)
        others = torch.stack([_permutation(T - 1) for _ in range(T)])
        own = torch.arange(T, device=others.device).unsqueeze(1)
        keys = _keys(torch.cat((own, others + (others >= own)), 1), M.device)
        if self._phi_t is None or self._phi_t.shape != M.shape:
            targets = torch.zeros(M.shape, dtype=torch.float64, device=M.device)
        else:
            targets = self._phi_t.to(M.device, torch.float64, copy=True)
        update_mask = M.isfinite().all().expand(T)
        C = operators.gradvac(M.unsqueeze(0), keys, targets.unsqueeze(0), update_mask, float(self.beta))
        self._phi_t = targets
        return C[0].sum(0).to(gramian.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        loaded = state_dict.get(f"{prefix}_phi_t")
        if loaded is not None and (self._phi_t is None or self._phi_t.shape != loaded.shape):
            self._phi_t = torch.zeros_like(loaded, dtype=torch.float64)
        super()._load_from_state_dict(state_dict, prefix, *args)


class GradVac(theirs.GradVac, GramianWeightedAggregator):
    """TorchJD's GradVac, on gradkern.

    Args:
        beta: how far a target moves toward the cosine in a step, from 0 to 1.
        eps: checked and kept, but without effect.
    """

    def __init__(self, beta: float = 0.5, eps: float = 1e-8) -> None:
        GramianWeightedAggregator.__init__(self, GradVacWeighting(beta, eps))


class AlignedMTL(theirs.AlignedMTL, GramianWeightedAggregator):
    """TorchJD's AlignedMTL, with Gramian and combination on gradkern."""


class CAGrad(theirs.CAGrad, GramianWeightedAggregator):
    """TorchJD's CAGrad, on gradkern."""

    def __init__(self, c: float, norm_eps: float = 0.0001) -> None:
        GramianWeightedAggregator.__init__(self, CAGradWeighting(c, norm_eps))


class DualProj(theirs.DualProj, GramianWeightedAggregator):
    """TorchJD's DualProj, on gradkern."""

    def __init__(self, pref_vector: Tensor | None = None, projector: DualConeProjector | None = None) -> None:
        GramianWeightedAggregator.__init__(self, DualProjWeighting(pref_vector, projector))


class FairGrad(theirs.FairGrad, GramianWeightedAggregator):
    """TorchJD's FairGrad, on gradkern.

    Args:
        alpha: the kind of fairness, at least 0.
        max_iters: kept, but without effect.
    """

    def __init__(self, alpha: float, max_iters: int | None = None) -> None:
        GramianWeightedAggregator.__init__(self, FairGradWeighting(alpha, max_iters))


class IMTLG(theirs.IMTLG, GramianWeightedAggregator):
    """TorchJD's IMTLG, on gradkern."""

    def __init__(self) -> None:
        GramianWeightedAggregator.__init__(self, IMTLGWeighting())


class NashMTL(theirs.NashMTL):
    """TorchJD's NashMTL on gradkern, without cvxpy and ECOS.

    Args:
        n_tasks: the number of rows of the matrices.
        max_norm: the length that updates are cut to; 0 for none.
        update_weights_every: the number of calls that share one solution.
        optim_niter: checked and kept, but without effect.
    """

    def __init__(
        self, n_tasks: int, max_norm: float = 1.0, update_weights_every: int = 1, optim_niter: int = 20
    ) -> None:
        weighting = NashMTLWeighting(n_tasks, max_norm, update_weights_every, optim_niter)
        theirs.WeightedAggregator.__init__(self, weighting)

    @staticmethod
    def _combine(matrix: Tensor, weights: Tensor) -> Tensor:
        return combine(matrix, weights)


class Krum(theirs.Krum, GramianWeightedAggregator):
    """TorchJD's Krum, on gradkern."""

    def __init__(self, n_byzantine: int, n_selected: int = 1) -> None:
        GramianWeightedAggregator.__init__(self, KrumWeighting(n_byzantine, n_selected))


class MGDA(theirs.MGDA, GramianWeightedAggregator):
    """TorchJD's MGDA, with Gramian and combination on gradkern."""


class PCD(theirs.PCD, GramianWeightedAggregator):
    """TorchJD's PCD, on gradkern."""

    def __init__(self, tau: float | Tensor = 0.02, beta: float = 0.999, eps: float = 1e-8) -> None:
        GramianWeightedAggregator.__init__(self, PCDWeighting(tau, beta, eps))


class UPGrad(theirs.UPGrad, GramianWeightedAggregator):
    """TorchJD's UPGrad, on gradkern."""

    def __init__(self, pref_vector: Tensor | None = None, projector: DualConeProjector | None = None) -> None:
        GramianWeightedAggregator.__init__(self, UPGradWeighting(pref_vector, projector))


def _gramian(matrix: Tensor) -> PSDMatrix:
    return cast(PSDMatrix, gramian(matrix))


def _permutation(n: int) -> Tensor:
    """Return a permutation, drawn on the default device as TorchJD draws it; on the CPU if that device is "meta"."""
    drawn = torch.randperm(n)
    return torch.randperm(n, device="cpu") if drawn.is_meta else drawn


def _keys(order: Tensor, device: torch.device) -> Tensor:
    """Return an order as the keys that gradkern's methods take: (1, T, T) on ``device``.

    The key of task i for partner j is the place of j in row i.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """
    if capturing(device):
        raise RuntimeError("a CUDA graph cannot draw on the CPU as TorchJD does: use gradkern's own method")
    keys = order.argsort(-1).float().unsqueeze(0)
    if device.type == GPU and not keys.is_cuda:
        keys = keys.pin_memory()  # so that the host does not wait for the copy
    return keys.to(device, non_blocking=True)

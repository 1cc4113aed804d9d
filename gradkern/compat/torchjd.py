"""TorchJD's aggregators on gradkern: import them from ``gradkern.compat.torchjd`` in place of ``torchjd.aggregation``.

Every name of ``torchjd.aggregation`` is here, with its arguments, attributes and ``repr``. The classes defined here
derive from TorchJD's, so aggregators work in ``torchjd.autojac``, and weightings in ``torchjd.autogram``. The work is
divided as follows:

- ``PCGrad`` and ``GradVac``, with their weightings, run on gradkern entirely. Orders are drawn as TorchJD draws them,
  so equal seeds give equal steps.
- ``AlignedMTL``, ``CAGrad``, ``DualProj``, ``FairGrad``, ``IMTLG``, ``Krum``, ``MGDA``, ``PCD``, ``UPGrad`` compute
  Gramian and combination on gradkern, and take TorchJD's weights. So does an aggregator of yours that derives from
  ``GramianWeightedAggregator``.
- Everything else is TorchJD's, unchanged: methods without a Gramian (``ConFIG``, ``GradDrop``, ``TrimmedMean``,
  ``ExcessMTL``) or with one inside their weighting (``NashMTL``), and methods of fixed or random weights (``Sum``,
  ``Mean``, ``Constant``, ``Random``), whose one product with the gradients could not be faster.

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
- A step that is not finite does not change ``GradVac``'s targets. TorchJD's are NaN from then on, and correct nothing.
- ``GradVac``'s targets are float64, on the device of the Gramian, and are kept if the dtype changes. Checkpoints load
  into fresh instances. They are exchangeable with TorchJD's, which load into instances that have made a step.
- A matrix of integers, of complex numbers or that is sparse is an error, whose message names the conversion:
  ``J.float()``, ``torch.view_as_real(J).flatten(1)`` or ``J.to_dense()``.
- A matrix of no rows is an error, and so is capture in a CUDA graph, which would repeat orders drawn on the host.

Gramian and combination take some 20 to 50 µs more, in one call, than two products of small matrices. The methods with
TorchJD's weights are therefore slower than in TorchJD for gradients of 10⁴ numbers, and faster for 10⁶.
"""

from typing import Any, cast

import torch
from torch import Tensor

from gradkern.aggregators.base import check_gramian
from gradkern.ops import combine, gramian, operators
from gradkern.ops.capture import capturing
from gradkern.ops.devices import GPU
from gradkern.ops.dtypes import arithmetic_dtype

try:
    import torchjd.aggregation as theirs
except ImportError as error:
    raise ImportError("gradkern.compat.torchjd needs TorchJD: pip install 'torchjd>=0.18'") from error
from torchjd.linalg import PSDMatrix

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
        M = _computable(gramian)
        T = len(M)
        keys = _keys(torch.stack([torch.randperm(T) for _ in range(T)]), M.device)
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
        M = _computable(gramian)
        T = len(M)
        own = torch.arange(T).unsqueeze(1)
        others = torch.stack([torch.randperm(T - 1) for _ in range(T)])
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
    """TorchJD's CAGrad, with Gramian and combination on gradkern."""


class DualProj(theirs.DualProj, GramianWeightedAggregator):
    """TorchJD's DualProj, with Gramian and combination on gradkern."""


class FairGrad(theirs.FairGrad, GramianWeightedAggregator):
    """TorchJD's FairGrad, with Gramian and combination on gradkern."""


class IMTLG(theirs.IMTLG, GramianWeightedAggregator):
    """TorchJD's IMTLG, with Gramian and combination on gradkern."""


class Krum(theirs.Krum, GramianWeightedAggregator):
    """TorchJD's Krum, with Gramian and combination on gradkern."""


class MGDA(theirs.MGDA, GramianWeightedAggregator):
    """TorchJD's MGDA, with Gramian and combination on gradkern."""


class PCD(theirs.PCD, GramianWeightedAggregator):
    """TorchJD's PCD, with Gramian and combination on gradkern."""


class UPGrad(theirs.UPGrad, GramianWeightedAggregator):
    """TorchJD's UPGrad, with Gramian and combination on gradkern."""


def _gramian(matrix: Tensor) -> PSDMatrix:
    return cast(PSDMatrix, gramian(matrix))


def _computable(gramian: Tensor) -> Tensor:
    """Return the Gramian in the dtype that the methods take. autogram gives it in the model's dtype."""
    M = gramian.to(arithmetic_dtype(gramian.dtype))
    check_gramian(M)
    return M


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

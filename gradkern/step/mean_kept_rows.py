"""The rows of a step through activations with ``finish="kept"`` on several ranks."""

from dataclasses import dataclass, field

from torch import Tensor

from gradkern.distributed.comm import Comm
from gradkern.gradients.layouts import Row
from gradkern.gradients.param_grads import readable
from gradkern.gradients.parameters import Targets
from gradkern.step.activation_rows import KeptRows
from gradkern.step.mean_backward import mean_results
from gradkern.step.on_ranks import agreed_reach


@dataclass
class MeanKeptRows(KeptRows):
    """The task gradients of this rank as factors. The Gramian and the combination are those of means over the ranks.

    Attributes:
        comm: the ranks.
        targets: the parameters.
    """

    comm: Comm = field(kw_only=True)
    targets: Targets = field(kw_only=True)

    def _combined(self, w: Tensor, unshared_weights: Tensor | None) -> dict[Tensor, Tensor]:
        """Return the means over the ranks of their combinations, for each parameter that any rank reaches."""
        targets = self.targets
        rows: list[Row] = []

        def here() -> list[tuple[bool, ...]]:
            found = KeptRows._combined(self, w, unshared_weights)
            row = readable([found.get(p) for p in targets.tensors], targets.tensors, targets.layouts)
            rows.append(row)
            return [tuple([g is not None for g in row])]

        (reach,) = agreed_reach(self.comm, targets, here)
        return dict(mean_results(self.comm, targets, reach, rows[0]))

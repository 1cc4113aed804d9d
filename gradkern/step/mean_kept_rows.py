"""The rows of a step through activations with ``finish="kept"`` on several ranks."""

from dataclasses import dataclass, field

from torch import Tensor

from gradkern.distributed.comm import Comm
from gradkern.gradients.layouts import Row
from gradkern.gradients.parameters import Targets
from gradkern.step.activation_rows import KeptRows
from gradkern.step.mean_backward import mean_grads


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

        def here() -> Row:
            found = KeptRows._combined(self, w, unshared_weights)
            return [found.get(p) for p in self.targets.tensors]

        return dict(mean_grads(self.comm, self.targets, here))

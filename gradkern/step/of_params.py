"""The properties of rows whose columns are those of whole parameters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkern.gradients.plan import Arrangement


class OfParams:
    """Rows over the parameters of a step.

    Attributes:
        params: n parameters.
        arrangement: the columns of the rows.
    """

    params: Sequence[Tensor]
    arrangement: Arrangement

    @property
    def device(self) -> torch.device:
        """The device of all parameters."""
        return self.params[0].device

    @property
    def of_step(self) -> Sequence[Tensor]:
        """The parameters of the step, which ``params`` are."""
        return self.params

    @property
    def of_params(self) -> Arrangement:
        """The columns of whole parameters, which these are."""
        return self.arrangement

"""The tables that ``gradkern tune`` has written, for the launches that ask for a device's table."""

import torch

from gradkern.kernels.served import Choices, served


def _table(device: torch.device) -> Choices:
    from gradkern.tuning.reading import choices_of  # at the first launch on a device, and not with gradkern

    return choices_of(device)


served.table = _table

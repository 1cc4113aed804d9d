"""The tables that ``gradkern tune`` has written. They are read at the first launch on a device, and not at import."""

import torch

from gradkern.kernels.served import Choices, served


def _table(device: torch.device) -> Choices:
    from gradkern.tuning.reading import serving

    return serving(device).choices


def settings_digest(device: torch.device) -> int:
    """Return a number that is the same on ranks whose devices take the same settings."""
    from gradkern.tuning.reading import serving

    return serving(device).digest


def settings_origin(device: torch.device) -> str:
    """Return where a device's settings come from, in words."""
    from gradkern.tuning.reading import serving

    return serving(device).origin


served.table = _table

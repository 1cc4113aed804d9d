"""The tables that ``gradkern tune`` has written. They are read at the first launch on a device, and not at import."""

from typing import Any

import torch

from gradkern.kernels.served import Choices, served


def _table(device: torch.device) -> Choices:
    from gradkern.ops.tables.reading import serving

    return serving(device).choices


def changed_settings(device: torch.device) -> tuple[tuple[Any, ...], ...]:
    """Return the settings of a device that are not the defaults: ranks that have the same ones compute alike."""
    from gradkern.ops.tables.reading import serving

    return serving(device).changed


def settings_origin(device: torch.device) -> str:
    """Return where a device's settings come from, in words."""
    from gradkern.ops.tables.reading import serving

    return serving(device).origin


served.table = _table

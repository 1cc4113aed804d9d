"""Warnings that point at the user's line."""

import contextlib
import sys
import warnings
from pathlib import Path

import torch

_BETWEEN = (
    *(str(Path(str(module.__file__)).parent) for module in (sys.modules[__package__], torch)),
    str(contextlib.__file__),
)
"""The files of the frames between the user's line and a warning: this package, torch's hooks, context managers."""


def warn_user(text: str) -> None:
    """Warn of ``text`` at the innermost line outside of this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, UserWarning, stacklevel=level)

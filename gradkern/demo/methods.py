"""The methods that the demo compares: one line each."""

from collections.abc import Callable

import torch

import gradkern as gk

METHODS: dict[str, Callable[[torch.Generator], gk.Aggregator]] = {
    "Sum": lambda generator: gk.Sum(),
    "PCGrad": lambda generator: gk.PCGrad(generator=generator),
}
"""Name to factory. A method that draws random numbers takes them from the generator it is given."""

BASELINE = "Sum"
"""The method that step times are relative to."""

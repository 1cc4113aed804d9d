"""Comparison of every method with its naive twin. Each row of METHODS brings a case of the self-check."""

from collections.abc import Iterator
from functools import partial

import torch

from gradkern.aggregators.method import Method
from gradkern.aggregators.methods import METHODS
from gradkern.ops.registry import Cases, Comparison

SHAPES = [(1, 5), (2, 1001), (3, 1001), (6, 1001)]
"""T x P. T is small, since a twin may take 2**T times as long as its method."""
STEPS = 3
"""The number of steps of a method that are compared, since its state may change the next step."""


def _method(method: Method, dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for T, P in SHAPES if method.tasks is None else [(method.tasks, 1001)]:
        order = [torch.randperm(T).tolist() for _ in range(T)]
        # Rows share a direction that points both ways, so that about half of the pairs conflict clearly.
        steps = [(torch.randn(T, P) + torch.randn(T, 1)).to(dtype) for _ in range(STEPS)]
        aggregator = method.make(order, device)
        # A mean of gradients is rounded to their dtype in each step, and so is the update. Weights that are solved for
        # pass on such a rounding by the condition of the cosines, which is about 3 for these rows.
        roundings = 3 * (STEPS + 1) if aggregator.averages_rows else 1
        updates = method.expected([list(J) for J in steps], order, device)
        for step, (J, expected) in enumerate(zip(steps, updates, strict=False)):
            X = J.to(device)
            # Each of the T projections passes on the roundings of the rows before it.
            yield aggregator(X, **method.beside(X, step)), expected, roundings * T * J.double().abs().sum(0)


CASES: dict[str, Cases] = {f"method:{name}": partial(_method, method) for name, method in METHODS.items()}
"""Every row of METHODS, by its name after "method:", since an operator may have the same name."""

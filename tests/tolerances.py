"""The largest allowed distance of a result from the float64 truth, by the dtype that was stored, and its reason."""

import torch
from torch import Tensor

# Tolerances are relative to the size of the terms that were summed, not to the sum, in which terms may cancel.
# float64: a few hundred roundings of 1e-16. float32: sums of up to 2048 terms at a time, in any order. Roundings
# of random terms cancel, so that such a sum is off by some sqrt(2048) of them, 2.7e-6 (Higham and Mary 2019). Tests
# with terms that are not random take the bound for all terms, ``gradkern.ops.pytorch.chunks.error_bound``.
# bfloat16, float16: arithmetic is float32, so only the store rounds: half a unit in the last place of 8 and 11 bits,
# and a whole one where the interpreter truncates instead.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = list(TOLERANCES)


def assert_near(actual: Tensor, expected: Tensor, scale: Tensor | float, tolerance: float) -> None:
    """Assert that every |actual - expected| is at most ``tolerance * scale``. NaN is never near anything."""
    error = (actual.double() - expected.double()).abs()
    bound = tolerance * torch.as_tensor(scale, dtype=torch.float64, device=error.device)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert bool((error <= bound).all()), f"error {error.max().item():.3e}, at most {bound.max().item():.3e} allowed"

"""Pairs of overlaid digits from scikit-learn's bundled 8 x 8 images, as MultiMNIST makes them from MNIST."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

OFFSET = 2
"""Pixels by which the right digit lies right of and below the left one. MultiMNIST: about 8 of 28; here 2 of 8."""
SIDE = 8 + OFFSET
"""Width and height of a pair's canvas in pixels."""
TEST_SHARE = 0.25
"""The share of the single digits that is kept for testing."""


@dataclass(frozen=True)
class Digits:
    """Holds n single digits.

    Attributes:
        images: (n, 8, 8) float32 in [0, 1].
        labels: (n,) int64, 0 … 9.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Pairs:
    """Holds n overlaid pairs and their labels for three tasks.

    Attributes:
        images: (n, 1, SIDE, SIDE) float32 in [0, 1].
        labels: for each task (n,) int64: the left digit, the right digit, and 1 where the left digit is the larger
            one, 0 where it is smaller or equal.
    """

    images: Tensor
    labels: list[Tensor]

    def to(self, device: torch.device) -> "Pairs":
        """Return the same pairs on ``device``."""
        return Pairs(self.images.to(device), [label.to(device) for label in self.labels])


def split_digits(rng: np.random.Generator) -> tuple[Digits, Digits]:
    """Shuffle all bundled digits and cut them into training and test. No image is in both, so no pair can leak one."""
    from sklearn.datasets import load_digits

    flat, labels = load_digits(return_X_y=True)
    images = (flat.reshape(-1, 8, 8) / 16).astype(np.float32)  # pixels count from 0 to 16
    order = rng.permutation(len(images))
    test, train = np.split(order, [round(TEST_SHARE * len(order))])
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])


def overlaid_pairs(digits: Digits, n: int, rng: np.random.Generator) -> Pairs:
    """Draw ``n`` pairs with replacement. Of two overlapping pixels the brighter one is on top."""
    left, right = rng.integers(len(digits.labels), size=(2, n))
    images = np.zeros((n, 1, SIDE, SIDE), np.float32)
    images[:, 0, :8, :8] = digits.images[left]
    lower_right = images[:, 0, OFFSET:, OFFSET:]
    np.maximum(lower_right, digits.images[right], out=lower_right)
    a, b = digits.labels[left], digits.labels[right]
    return Pairs(torch.from_numpy(images), [torch.from_numpy(label) for label in (a, b, (a > b).astype(np.int64))])

"""A small network: a convolutional trunk that three tasks share, and a linear head for each task."""

from itertools import combinations

from torch import Tensor, nn

from gradkern.demo.data import SIDE

TASKS = {"left": 10, "right": 10, "left larger": 2}
"""Each task's number of classes."""
TASK_PAIRS = list(combinations(range(len(TASKS)), 2))
"""The pairs i < j of tasks."""

CHANNELS, FEATURES = 8, 128


class MultiTaskNet(nn.Module):
    """Network with about 55 000 parameters, nearly all of them in the trunk, which every loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, CHANNELS, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * CHANNELS * (SIDE // 2) ** 2, FEATURES),
            nn.ReLU(),
        )
        self.heads = nn.ModuleList(nn.Linear(FEATURES, classes) for classes in TASKS.values())

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the logits of each task, (B, classes), for images (B, 1, SIDE, SIDE). The trunk runs once."""
        features = self.trunk(images)
        return [head(features) for head in self.heads]

"""The settings of a run."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from examples.minbert.examples import TASKS
from examples.minbert.heads import HEADS, LOSSES
from examples.minbert.methods import METHODS, OPTIMIZERS
from examples.minbert.schemes import SCHEMES, Scheme
from gradkern.sampling import SCHEMES as SAMPLINGS

MINIMUM = {"epochs": 1, "steps": 1, "judged": 1, "patience": 1, "max_length": 3, "seed": 0}
"""Smallest values of the integer settings."""
MAXIMUM = 2**63 - 1
"""Largest value of the integer settings, the largest seed that every random number generator accepts."""


@dataclass(frozen=True)
class Settings:
    """All settings that determine the results of a run. Where a scheme has the same setting, None selects its value.

    Raises:
        ValueError: a setting is not valid, or has no effect together with another.

    Attributes:
        scheme: key of ``SCHEMES``.
        method: key of ``METHODS``.
        data: folder of the course project's files; None for synthetic sentences.
        skip_malformed: whether to leave out malformed rows and list them; otherwise they raise.
        weights: name or folder for ``weights.find``.
        device: name of a torch device.
        epochs: epochs of each phase.
        steps: steps per epoch; None for one pass over the data.
        heads: name of each task's head.
        similarity: loss of the similarity task, "mse" or "pearson".
        batch_sizes: batch size of each task.
        max_length: most tokens of a sentence, including [CLS] and [SEP]; longer sentences are truncated.
        lr: learning rate.
        optimizer: key of ``OPTIMIZERS``.
        task_weights: weights of the losses in unitary scalarization; None for ones.
        sampling: scheme of ``TaskSampler``.
        suppression: probability to drop an entry of a shared parameter's gradient; None for no suppression.
        dropout: dropout probability in BERT and in the heads.
        amp: whether forward passes run under autocast to bfloat16.
        seed: seed of all random choices.
        judged: dev examples of each task that an epoch is evaluated on, and a quarter as many of the training set;
            None for all of dev and a fixed part of the training set.
        patience: number of epochs without a better score that ends a phase; None to train all epochs.
    """

    scheme: str
    method: str
    data: str | None = None
    skip_malformed: bool = False
    weights: str = "random"
    device: str = "cpu"
    epochs: int = 10
    steps: int | None = None
    heads: tuple[str, ...] | None = None
    similarity: str | None = None
    batch_sizes: tuple[int, ...] | None = None
    max_length: int = 128
    lr: float | None = None
    optimizer: str = "adamw"
    task_weights: tuple[float, ...] | None = None
    sampling: str | None = None
    suppression: float | None = None
    dropout: float = 0.1
    amp: bool = False
    seed: int = 0
    judged: int | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        self._check_names("scheme", SCHEMES)
        self._check_names("method", METHODS)
        self._check_names("optimizer", OPTIMIZERS)
        self._check_names("sampling", SAMPLINGS)
        self._check_names("similarity", LOSSES["sts"])
        for name, minimum in MINIMUM.items():
            value = getattr(self, name)
            if value is not None and not minimum <= value <= MAXIMUM:
                raise ValueError(f"{name} must be from {minimum} to 2**63 - 1, got {value!r}")
        for name in ("suppression", "dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{name} must be from 0 to below 1, got {value!r}")
        for name in ("batch_sizes", "task_weights", "lr"):
            value = getattr(self, name)
            for number in value if isinstance(value, Sequence) else (value,):
                if number is not None and not 0 < number < float("inf"):
                    raise ValueError(f"{name} must be positive, got {value!r}")
        for name in ("heads", "batch_sizes", "task_weights"):
            value = getattr(self, name)
            if value is not None and len(value) != len(TASKS):
                raise ValueError(f"{name} must have {len(TASKS)} entries, one for each of {TASKS}; got {value!r}")
        for task, name in zip(TASKS, self.heads or (), strict=False):
            if name not in HEADS[task]:
                raise ValueError(f"heads[{task!r}] must be one of {', '.join(map(repr, HEADS[task]))}; got {name!r}")
        self._check_effects()

    def _check_names(self, name: str, known: Collection[str]) -> None:
        value = getattr(self, name)
        if value is not None and value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}")

    def _check_effects(self) -> None:
        """Reject settings that would have no effect, because a report would list them as if they had one."""
        if self.task_weights is not None and self.method != "unitary":
            raise ValueError(
                f"task_weights apply to the method 'unitary' only, not to {self.method!r}, which finds its own weights"
            )
        for name in ("suppression", "sampling"):
            if self.method == "single-task" and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} applies to tasks that train together, not to 'single-task'; got {getattr(self, name)!r}"
                )
        scheme = self.resolved()
        if scheme.similarity == "pearson" and scheme.batch_sizes[TASKS.index("sts")] == 1:
            raise ValueError(f"the loss 'pearson' needs at least 2 pairs per batch, got {scheme.batch_sizes!r}")

    def resolved(self) -> Scheme:
        """Return the scheme, with the values that are set here."""
        scheme = SCHEMES[self.scheme]
        changed = {name: getattr(self, name) for name in ("heads", "similarity", "sampling", "batch_sizes", "lr")}
        scheme = replace(scheme, **{name: value for name, value in changed.items() if value is not None})
        return scheme.alone() if self.method == "single-task" else scheme

"""What decides a run."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from examples.minbert.examples import TASKS
from examples.minbert.heads import HEADS, LOSSES
from examples.minbert.methods import METHODS
from examples.minbert.schemes import SCHEMES, Scheme
from examples.minbert.training import OPTIMIZERS
from gradkern.sampling import SCHEMES as SAMPLINGS

LEAST = {"epochs": 1, "steps": 1, "judged": 1, "patience": 1, "max_length": 3, "seed": 0}
"""Of whole numbers."""
MOST = 2**63 - 1
"""Of the same, and what fits into every random number generator."""


@dataclass(frozen=True)
class Settings:
    """What decides the outcome of a run, but for the machine. None is for what the scheme says.

    Raises:
        ValueError: one of them is not what it can be, or has no meaning beside another.

    Attributes:
        scheme: in ``SCHEMES``.
        method: in ``METHODS``.
        data: folder of the course project's files; None for made-up sentences.
        skip_malformed: leave out rows that are, and tell; else they raise.
        weights: as ``weights.find`` takes it.
        device: of torch.
        epochs: of each phase.
        steps: of an epoch.
        heads: of each task.
        similarity: the loss of that task, "mse" or "pearson".
        batch_sizes: of each task.
        max_length: tokens of a sentence, [CLS] and [SEP] among them; those beyond are cut off.
        lr: learning rate.
        optimizer: in ``OPTIMIZERS``.
        task_weights: of the losses in the sum of unitary scalarization.
        sampling: of ``TaskSampler``.
        suppression: the probability to drop an entry of a shared parameter's gradient; None for no masks.
        dropout: of BERT and of the heads.
        amp: forward passes under autocast to bfloat16.
        seed: of all random choices.
        judged: how many examples of each task's dev set are judged after an epoch, and of training a quarter as many;
            None for all of dev and a fixed part of training.
        patience: epochs without a better score, after which a phase ends; None to go on.
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
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= MOST:
                raise ValueError(f"{name} must be from {least} to 2**63 - 1, got {value!r}")
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
                raise ValueError(f"{name} must be {len(TASKS)}, one for each of {TASKS}; got {value!r}")
        for task, name in zip(TASKS, self.heads or (), strict=False):
            if name not in HEADS[task]:
                raise ValueError(f"heads[{task!r}] must be one of {', '.join(map(repr, HEADS[task]))}; got {name!r}")
        self._check_meaning()

    def _check_names(self, name: str, known: Collection[str]) -> None:
        value = getattr(self, name)
        if value is not None and value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {value!r}")

    def _check_meaning(self) -> None:
        """What would be left without any effect is refused, lest a report tell of it."""
        if self.task_weights is not None and self.method != "unitary":
            raise ValueError(
                f"task_weights are of the method 'unitary', not of {self.method!r}; surgery weighs by itself"
            )
        for name in ("suppression", "sampling"):
            if self.method == "single-task" and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is of tasks that train together, not of 'single-task'; got {getattr(self, name)!r}"
                )
        scheme = self.resolved()
        if scheme.similarity == "pearson" and scheme.batch_sizes[TASKS.index("sts")] == 1:
            raise ValueError(f"batch_sizes of 1 have no correlation to learn similarity by, got {scheme.batch_sizes!r}")

    def resolved(self) -> Scheme:
        """The scheme with what is set here in place of its own."""
        scheme = SCHEMES[self.scheme]
        own = {name: getattr(self, name) for name in ("heads", "similarity", "sampling", "batch_sizes", "lr")}
        scheme = replace(scheme, **{name: value for name, value in own.items() if value is not None})
        return scheme.alone() if self.method == "single-task" else scheme

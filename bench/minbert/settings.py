"""What decides a run."""

from dataclasses import dataclass, replace

from bench.minbert.schemes import SCHEMES, Scheme


@dataclass(frozen=True)
class Settings:
    """What decides the outcome of a run, but for the machine. None is for what the scheme says.

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
        lr: learning rate.
        optimizer: in ``OPTIMIZERS``.
        task_weights: of the losses in the sum of unitary scalarization.
        sampling: of ``TaskSampler``.
        suppression: the probability to drop an entry of a shared parameter's gradient.
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

    def resolved(self) -> Scheme:
        """The scheme with what is set here in place of its own."""
        scheme = SCHEMES[self.scheme]
        own = {name: getattr(self, name) for name in ("heads", "similarity", "sampling", "batch_sizes", "lr")}
        scheme = replace(scheme, **{name: value for name, value in own.items() if value is not None})
        return scheme.alone() if self.method == "single-task" else scheme

"""The five reports' ways to train, by the first words of their titles: heads, loss, sampling, batch sizes, phases."""

from dataclasses import dataclass, replace

from examples.minbert.examples import TASKS


@dataclass(frozen=True)
class Phase:
    """A stretch of training with an optimizer of its own, for as many epochs as the run is told.

    Attributes:
        tasks: that train, of ``TASKS``.
        copy: begin with the weights of the run's beginning, and lay the outcome aside. The next phase that is no copy
            begins with the mean of what was laid aside; heads as their own tasks' copies have them.
        frozen: BERT stays as it is.
    """

    name: str
    tasks: tuple[str, ...] = TASKS
    copy: bool = False
    frozen: bool = False


@dataclass(frozen=True)
class Scheme:
    """One report's.

    Attributes:
        heads: of each task, as ``heads.py`` names them.
        similarity: the loss of that task, "mse" or "pearson".
        layer: whether all tasks share a layer between BERT and their heads.
        sampling: of ``TaskSampler``. Other than "joint", a step trains one task, and the others' last gradients are
            kept for surgery.
        batch_sizes: by task.
        lr: learning rate for BERT-base, the course project's.
        phases: one after another.
    """

    heads: tuple[str, str, str]
    similarity: str = "mse"
    layer: bool = False
    sampling: str = "joint"
    batch_sizes: tuple[int, int, int] = (8, 8, 8)
    lr: float = 1e-5
    phases: tuple[Phase, ...] = (Phase("fine-tuning"),)

    @property
    def heads_by_task(self) -> dict[str, str]:
        """As ``heads.py`` takes them."""
        return dict(zip(TASKS, self.heads, strict=True))

    @property
    def losses(self) -> dict[str, str]:
        """By task, as ``heads.py`` takes them."""
        return dict(zip(TASKS, ("cross-entropy", "binary-cross-entropy", self.similarity), strict=True))

    @property
    def main(self) -> tuple[Phase, ...]:
        """What a run's times and memory are of: the first phase that trains all tasks, or where none does, all."""
        return next(((phase,) for phase in self.phases if phase.tasks == TASKS), self.phases)

    def alone(self) -> "Scheme":
        """The same with a model for each task, which sees no other."""
        frozen = self.main[0].frozen
        return replace(self, phases=tuple(replace(phase, frozen=frozen) for phase in ALONE), sampling="joint")


ALONE = tuple(Phase(f"{task} alone", (task,), copy=True) for task in TASKS)

# With MiniLM's weights and eight pairs in a batch, similarity's gradient is at first 2 to 3 times as long as
# sentiment's under the multiplicative head and squared error, 5 times under the joint one and the sigmoid, and 30 under
# the cosine: so the multiplicative head is chosen where all tasks train BERT.
SCHEMES = {
    # The report's: one task a step, sampled, against the others' last gradients. Chosen: the heads, the first sampler.
    "rhapsody": Scheme(("linear", "joint", "multiplicative"), sampling="annealed"),
    # The report's: all tasks in a step. Chosen: the heads; and that its loss is 1 - r, which at chance is what the
    # report's weights make as large as the other two losses.
    "unitary-scalarization": Scheme(("linear", "concatenated", "multiplicative"), similarity="pearson"),
    # The report's: all tasks in a step. Chosen: the heads, and that the batch sizes of 8, 20 and 8 are this one's.
    "gradattention": Scheme(("two-layer-tanh", "multiplicative", "multiplicative"), batch_sizes=(8, 20, 8)),
    # The report's: BERT is frozen under a linear and a non-linear layer, and linear heads. Chosen: that the tasks share
    # the layer, for else there were nothing to do surgery on; ReLU; and the sigmoid after the similarity's head.
    "gradient-descent": Scheme(
        ("linear", "concatenated", "sigmoid"), layer=True, lr=1e-3, phases=(Phase("on frozen BERT", frozen=True),)
    ),
    # The report's: the phases. Chosen: the heads, and that 1 - r is this one's loss, which copies learn each by itself.
    "single-task-pretraining": Scheme(
        ("two-layer-relu", "mean-pooled", "multiplicative"),
        similarity="pearson",
        phases=(*ALONE, Phase("fine-tuning"), Phase("heads alone", frozen=True)),
    ),
}
"""By name on the command line."""

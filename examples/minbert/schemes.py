"""The training schemes of the five reports, named by the first words of their titles.

A scheme has heads, losses, sampling, batch sizes, a learning rate and phases.
"""

from dataclasses import dataclass, replace

from examples.minbert.examples import TASKS


@dataclass(frozen=True)
class Phase:
    """A part of training with its own optimizer. The run's settings give its number of epochs.

    Attributes:
        name: name of the phase.
        tasks: tasks that train, from ``TASKS``.
        copy: whether the phase trains a copy of the model from the initial weights. The next phase that is no copy
            starts from the mean of the copies' encoders; each head comes from its own task's copy.
        frozen: whether BERT is frozen.
    """

    name: str
    tasks: tuple[str, ...] = TASKS
    copy: bool = False
    frozen: bool = False


@dataclass(frozen=True)
class Scheme:
    """The training scheme of one report.

    Attributes:
        heads: names of the tasks' heads, from ``HEADS``.
        similarity: loss of the similarity task, "mse" or "pearson".
        layer: whether all tasks share a layer between BERT and their heads.
        sampling: scheme of ``TaskSampler``. Unless it is "joint", a step trains one task, and the others' last
            gradients are kept for surgery.
        batch_sizes: batch size of each task.
        lr: learning rate for BERT-base, from the course project.
        phases: phases in their order.
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
        """Name of each task's head."""
        return dict(zip(TASKS, self.heads, strict=True))

    @property
    def losses(self) -> dict[str, str]:
        """Name of each task's loss."""
        return dict(zip(TASKS, ("cross-entropy", "binary-cross-entropy", self.similarity), strict=True))

    @property
    def main(self) -> tuple[Phase, ...]:
        """Phases whose times and memory are reported: the first that trains all tasks, or else every phase."""
        return next(((phase,) for phase in self.phases if phase.tasks == TASKS), self.phases)

    def alone(self) -> "Scheme":
        """Return the scheme with a separate model for each task."""
        frozen = self.main[0].frozen
        return replace(self, phases=tuple(replace(phase, frozen=frozen) for phase in ALONE), sampling="joint")


ALONE = tuple(Phase(f"{task} alone", (task,), copy=True) for task in TASKS)

# With MiniLM's weights and eight pairs in a batch, the similarity gradient is initially 2 to 3 times as long as
# sentiment's with the multiplicative head and squared error, 5 times with the joint head and the sigmoid, and 30 times
# with the cosine. The multiplicative head is therefore our choice wherever all tasks train BERT.
#
# "Report" marks what a report states. "Choice" marks what it leaves open and we chose.
SCHEMES = {
    # Report: a step trains one sampled task, against the others' last gradients. Choice: the heads; the first sampler.
    "rhapsody": Scheme(("linear", "joint", "multiplicative"), sampling="annealed"),
    # Report: a step trains all tasks. Choice: the heads; the loss 1 - r, which is 1 at chance level, so that the
    # report's weights make all three losses equal at chance level.
    "unitary-scalarization": Scheme(("linear", "concatenated", "multiplicative"), similarity="pearson"),
    # Report: a step trains all tasks. Choice: the heads; the batch sizes of 8, 20 and 8 for this scheme.
    "gradattention": Scheme(("two-layer-tanh", "multiplicative", "multiplicative"), batch_sizes=(8, 20, 8)),
    # Report: BERT is frozen under a linear and a non-linear layer and linear heads. Choice: the tasks share the layer,
    # because surgery needs shared parameters; ReLU; the sigmoid after the similarity head.
    "gradient-descent": Scheme(
        ("linear", "concatenated", "sigmoid"), layer=True, lr=1e-3, phases=(Phase("on frozen BERT", frozen=True),)
    ),
    # Report: the phases. Choice: the heads; the loss 1 - r, which here is also trained alone, in a copy.
    "single-task-pretraining": Scheme(
        ("two-layer-relu", "mean-pooled", "multiplicative"),
        similarity="pearson",
        phases=(*ALONE, Phase("fine-tuning"), Phase("heads alone", frozen=True)),
    ),
}
"""Schemes by their name on the command line."""

"""Each report's experiment, one after another: which runs it is made of, and how large they are."""

import math
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from examples.minbert.record import is_complete
from examples.minbert.report import report
from examples.minbert.run import Run
from examples.minbert.settings import Settings


@dataclass(frozen=True)
class Size:
    """Of all runs.

    Attributes:
        epochs: of each phase.
        steps: of an epoch; twice as many where tasks take turns. None for one pass over the data.
        judged: as in ``Settings``.
        batch_sizes: of each task; None for the schemes'.
        max_length: tokens of a sentence.
        lr: learning rate; ten times this where BERT is frozen. None for the schemes', which are for BERT-base.
    """

    epochs: int = 10
    steps: int | None = None
    judged: int | None = None
    batch_sizes: tuple[int, ...] | None = None
    max_length: int = 128
    lr: float | None = None


SMALL = Size(epochs=2, steps=30, judged=200, batch_sizes=(16, 4, 16), max_length=40, lr=1e-4)
"""Of ``--small``. At the rate of 1e-4 MiniLM learns sentiment and similarity in sixty such steps. What decides it is
similarity's batch: of four pairs its gradient is ten times as long as sentiment's, most of it noise, and in the sum
nothing else is heard."""


def methods(*names: str) -> list[dict[str, Any]]:
    """Runs that differ in the method."""
    return [{"method": name} for name in names]


REPORT_WEIGHTS = (1.0, math.log(1 / 5) / math.log(1 / 2), -math.log(1 / 5))
"""Of the losses in "Unitary Scalarization or Gradient Surgery?"."""

EXPERIMENTS: dict[str, list[dict[str, Any]]] = {
    "unitary-scalarization": [
        *methods("single-task", "unitary"),
        {"method": "unitary", "task_weights": REPORT_WEIGHTS},
        *methods("pcgrad", "gradvac"),
    ],
    "rhapsody": [
        *(
            {"method": m, "sampling": s}
            for m, s in product(("unitary", "pcgrad"), ("round_robin", "random", "annealed"))
        ),
        *methods("pcgrad-random", "pcgrad-average", "pcgrad-most-similar", "pcgrad-most-different"),
        *methods("conflict-lr-attenuate", "conflict-lr-amplify"),
        *({"method": m, "dropout": p} for p in (0.30, 0.60) for m in ("unitary", "pcgrad")),
        *({"method": "pcgrad", "suppression": p, "dropout": p} for p in (0.30, 0.60)),
    ],
    "gradattention": methods("unitary", "pcgrad", "attention"),
    "gradient-descent": methods("single-task", "unitary", "pcgrad"),
    "single-task-pretraining": methods("pcgrad"),
}
"""By scheme."""


def runs(size: Size, **common: Any) -> dict[str, Settings]:
    """All of ``EXPERIMENTS`` at that size, by name."""
    made = {}
    for scheme, several in EXPERIMENTS.items():
        for own in several:
            settings = Settings(
                scheme=scheme,
                epochs=size.epochs,
                judged=size.judged,
                batch_sizes=size.batch_sizes,
                max_length=size.max_length,
                **common,
                **own,
            )
            resolved = settings.resolved()
            frozen, turns = resolved.main[0].frozen, resolved.sampling != "joint"
            lr = None if size.lr is None else size.lr * (10 if frozen else 1)
            steps = None if size.steps is None else size.steps * (2 if turns else 1)
            beside = (f"{name}-{_shown(value)}" for name, value in own.items() if name != "method")
            made["-".join([scheme, own["method"], *beside])] = replace(settings, lr=lr, steps=steps)
    return made


def _shown(value: Any) -> str:
    """A setting's value in the name of a folder."""
    return "-".join(f"{number:.3g}" for number in value) if isinstance(value, tuple) else str(value)


def suite(small: bool, out: Path, console: Console, **common: Any) -> None:
    """Run what is not complete in ``out``, from its checkpoint if it has one; then report on all.

    Args:
        small: at the size of ``SMALL``.
        out: a folder for each run's folder, and for the report.
        console: is told of progress.
        common: of all runs, as ``Settings`` takes them: where the data and the weights are, and the device.

    Raises:
        ValueError: a run that ``out`` has is of other settings.
    """
    several = runs(SMALL if small else Size(), **common)
    for k, (name, settings) in enumerate(several.items()):
        console.print(f"run {k + 1} of {len(several)}: {name}")
        if is_complete(out / name, settings):
            continue
        run = Run(settings, out / name, console)
        if run.checkpoint.exists():
            run.go_on()
        run.train()
    console.print(report([out / name for name in several], out), markup=False, soft_wrap=True)

"""The suite: the runs of each report's experiment, at full or small size."""

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
    """Size of all runs in a suite.

    Attributes:
        epochs: epochs of each phase.
        steps: steps per epoch, doubled if a step trains one task; None for one pass over the data.
        judged: same as in ``Settings``.
        batch_sizes: batch size of each task; None for the schemes' values.
        max_length: most tokens of a sentence.
        lr: learning rate, ten times this if BERT is frozen; None for the schemes' values, which suit BERT-base.
    """

    epochs: int = 10
    steps: int | None = None
    judged: int | None = None
    batch_sizes: tuple[int, ...] | None = None
    max_length: int = 128
    lr: float | None = None


SMALL = Size(epochs=2, steps=30, judged=200, batch_sizes=(16, 4, 16), max_length=40, lr=1e-4)
"""Size of ``--small``. At a rate of 1e-4 MiniLM learns sentiment and similarity in sixty such steps. The batch size of
similarity matters most: with four pairs its gradient is ten times as long as sentiment's and mostly noise, and it
dominates the sum."""


def methods(*names: str) -> list[dict[str, Any]]:
    """Return runs that differ in the method."""
    return [{"method": name} for name in names]


REPORT_WEIGHTS = (1.0, math.log(1 / 5) / math.log(1 / 2), -math.log(1 / 5))
"""Weights of the losses in "Unitary Scalarization or Gradient Surgery?"."""

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
"""Runs of each scheme's experiment."""


def runs(size: Size, **common: Any) -> dict[str, Settings]:
    """Return the settings of all runs of ``EXPERIMENTS`` at that size, by name."""
    made = {}
    for scheme, variants in EXPERIMENTS.items():
        for variant in variants:
            settings = Settings(
                scheme=scheme,
                epochs=size.epochs,
                judged=size.judged,
                batch_sizes=size.batch_sizes,
                max_length=size.max_length,
                **common,
                **variant,
            )
            resolved = settings.resolved()
            frozen, one_task = resolved.main[0].frozen, resolved.sampling != "joint"
            lr = None if size.lr is None else size.lr * (10 if frozen else 1)
            steps = None if size.steps is None else size.steps * (2 if one_task else 1)
            others = (f"{name}-{_folder_text(value)}" for name, value in variant.items() if name != "method")
            made["-".join([scheme, variant["method"], *others])] = replace(settings, lr=lr, steps=steps)
    return made


def _folder_text(value: Any) -> str:
    """Return the text of a setting's value in a folder's name."""
    return "-".join(f"{number:.3g}" for number in value) if isinstance(value, tuple) else str(value)


def suite(small: bool, out: Path, console: Console, **common: Any) -> None:
    """Run what is not complete in ``out``, from its checkpoint if it has one; then report on all runs.

    Args:
        small: whether to use the size ``SMALL``.
        out: folder for the runs' folders and the report.
        console: console that shows progress.
        common: settings of all runs: data, weights and device.

    Raises:
        ValueError: ``out`` has a run with other settings.
    """
    by_name = runs(SMALL if small else Size(), **common)
    for k, (name, settings) in enumerate(by_name.items()):
        console.print(f"run {k + 1} of {len(by_name)}: {name}")
        if is_complete(out / name, settings):
            continue
        run = Run(settings, out / name, console)
        if run.checkpoint.exists():
            run.resume()
        run.train()
    console.print(report([out / name for name in by_name], out), markup=False, soft_wrap=True)

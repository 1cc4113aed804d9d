"""``python -m examples.minbert``: ``train`` one run, the ``suite`` of the reports' experiments, ``report`` on runs."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from bench.device import parse_device
from examples.minbert.examples import TASKS
from examples.minbert.heads import LOSSES
from examples.minbert.methods import METHODS
from examples.minbert.record import has_complete
from examples.minbert.report import report
from examples.minbert.run import CHECKPOINT, Run
from examples.minbert.schemes import SCHEMES
from examples.minbert.settings import Settings
from examples.minbert.suite import suite
from examples.minbert.training import OPTIMIZERS
from gradkern.sampling import SCHEMES as SAMPLINGS

OUT = Path("minbert-out")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    options = vars(_parser().parse_args(arguments))
    command: Callable[..., None] = options.pop("command")
    try:
        command(**options)
    except KeyboardInterrupt:
        print("interrupted: go on with --resume; a suite goes on by itself", file=sys.stderr)
        return 130  # what a shell reports for a process that SIGINT ended
    except (OSError, ValueError, ModuleNotFoundError) as error:  # of what was given: files, settings, packages
        print(f"python -m examples.minbert: {error}", file=sys.stderr)
        return 1
    return 0


def _train(out: Path, resume: bool, **settings: object) -> None:
    decided = Settings(**settings)  # type: ignore[arg-type]  # the parser has their types
    if resume and not (out / CHECKPOINT).exists():
        raise FileNotFoundError(f"{out} has no {CHECKPOINT}: there is nothing to go on with")
    if not resume and (out / CHECKPOINT).exists():
        raise FileExistsError(f"{out} has a run that was interrupted: go on with --resume, or choose another --out")
    if not resume and has_complete(out):
        raise FileExistsError(f"{out} has a run: choose another --out")
    run = Run(decided, out, Console())
    if resume:
        run.go_on()
    run.train()


def _suite(small: bool, out: Path, **common: object) -> None:
    suite(small, out, Console(), **common)


def _report(runs: list[Path], out: Path) -> None:
    print(report(runs, out))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.minbert", description=__doc__)
    commands = parser.add_subparsers(required=True)

    train = commands.add_parser("train", help="one run", description="Train one model, resumable to the bit.")
    train.set_defaults(command=_train)
    train.add_argument("--scheme", choices=SCHEMES, default="unitary-scalarization", help="a report's (%(default)s)")
    train.add_argument("--method", choices=METHODS, default="pcgrad", help="default %(default)s")
    _add_common(train)
    of = f"of {', '.join(TASKS)} (default: scheme's)"
    train.add_argument("--heads", nargs=len(TASKS), metavar="NAME", help=of)
    train.add_argument("--similarity", choices=LOSSES["sts"], help="its loss (default: scheme's)")
    train.add_argument("--epochs", type=_positive, default=10, metavar="N", help="of each phase (default %(default)s)")
    train.add_argument("--steps", type=_positive, metavar="N", help="of an epoch (default: one pass over the data)")
    train.add_argument("--batch-sizes", type=_positive, nargs=len(TASKS), metavar="N", help=of)
    train.add_argument(
        "--max-length", type=_positive, default=128, metavar="N", help="tokens of a sentence (default %(default)s)"
    )
    train.add_argument("--lr", type=_rate, metavar="RATE", help="learning rate (default: scheme's, for BERT-base)")
    train.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="torch's, or ours (%(default)s)")
    train.add_argument("--sampling", choices=SAMPLINGS, help="which tasks a step trains (default: scheme's)")
    train.add_argument(
        "--task-weights", type=_rate, nargs=len(TASKS), metavar="W", help="of the losses in unitary's sum (default: 1)"
    )
    train.add_argument(
        "--suppression", type=_share, metavar="P", help="drop this share of the shared gradient's entries"
    )
    train.add_argument("--dropout", type=_share, default=0.1, metavar="P", help="in BERT and heads (%(default)s)")
    train.add_argument("--amp", action="store_true", help="forward passes under autocast to bfloat16")
    train.add_argument("--seed", type=_whole, default=0, metavar="N", help="of all random choices (%(default)s)")
    train.add_argument("--judged", type=_positive, metavar="N", help="examples of each task that an epoch ends with")
    train.add_argument(
        "--patience", type=_positive, metavar="N", help="end a phase after N epochs with no better score"
    )
    train.add_argument("--resume", action="store_true", help="go on where --out was interrupted")

    several = commands.add_parser(
        "suite",
        help="the reports' experiments",
        description="Rerun each report's experiment, then report. Runs that are complete in --out are not run again.",
    )
    several.set_defaults(command=_suite)
    _add_common(several)
    several.add_argument("--small", action="store_true", help="under half an hour on two cores with minilm")

    told = commands.add_parser(
        "report", help="tables and figures", description="The reports' tables and figures, of runs that were made."
    )
    told.set_defaults(command=_report)
    told.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs, or folders with such in them")
    told.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="default %(default)s")
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", metavar="DIR", help="folder of ids-sst-*, quora-* and sts-*.csv (default: made up)")
    parser.add_argument("--skip-malformed", action="store_true", help="leave out malformed rows, and tell which")
    parser.add_argument("--weights", default="random", help="minilm, a folder of BERT's, or random (%(default)s)")
    parser.add_argument(
        "--device", type=lambda text: str(parse_device(text)), default="cpu", help="cpu, cuda or cuda:N (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help="default %(default)s")


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _positive(text: str) -> int:
    if _whole(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not positive")
    return int(text)


def _rate(text: str) -> float:
    return _number(text, lambda value: value > 0, "positive")


def _share(text: str) -> float:
    return _number(text, lambda value: 0 <= value < 1, "from 0 to below 1")


def _number(text: str, holds: Callable[[float], bool], what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not holds(value) or value == float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number {what}")
    return value


if __name__ == "__main__":
    sys.exit(main())

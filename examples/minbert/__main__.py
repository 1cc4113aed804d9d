"""Fine-tune a BERT encoder on three tasks: train one run, run the suite of all experiments, or report on runs."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from bench.device import parse_device
from examples.minbert.examples import TASKS
from examples.minbert.heads import LOSSES
from examples.minbert.methods import METHODS, OPTIMIZERS
from examples.minbert.record import has_complete
from examples.minbert.report import report
from examples.minbert.run import CHECKPOINT, Run
from examples.minbert.schemes import SCHEMES
from examples.minbert.settings import Settings
from examples.minbert.suite import suite
from gradkern.sampling import SCHEMES as SAMPLINGS

OUT = Path("minbert-out")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = vars(_parser().parse_args(arguments))
    command: Callable[..., None] = options.pop("command")
    try:
        command(**options)
    except KeyboardInterrupt:
        print("interrupted: continue with train --resume, or by running the suite again", file=sys.stderr)
        return 130  # a shell's exit status for a process ended by SIGINT
    except (OSError, ValueError, ModuleNotFoundError) as error:  # the user's files, settings or packages are wrong
        print(f"python -m examples.minbert: {error}", file=sys.stderr)
        return 1
    return 0


def _train(out: Path, resume: bool, **options: object) -> None:
    settings = Settings(**options)  # type: ignore[arg-type]  # the parser has checked their types
    if resume and not (out / CHECKPOINT).exists():
        raise FileNotFoundError(f"{out} has no {CHECKPOINT}: there is nothing to resume")
    if not resume and (out / CHECKPOINT).exists():
        raise FileExistsError(f"{out} has an interrupted run: continue it with --resume, or choose another --out")
    if not resume and has_complete(out):
        raise FileExistsError(f"{out} has a complete run: choose another --out")
    run = Run(settings, out, Console())
    if resume:
        run.resume()
    run.train()


def _suite(small: bool, out: Path, **common: object) -> None:
    suite(small, out, Console(), **common)


def _report(runs: list[Path], out: Path) -> None:
    print(report(runs, out))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.minbert", description=__doc__)
    commands = parser.add_subparsers(required=True)

    train = commands.add_parser(
        "train",
        help="train one run",
        description="Train one run. It can be interrupted, and resumes to the same bits.",
    )
    train.set_defaults(command=_train)
    default = "default %(default)s"
    per_task = f"one for each of {', '.join(TASKS)} (default: the scheme's)"
    train.add_argument(
        "--scheme",
        choices=SCHEMES,
        default="unitary-scalarization",
        help=f"report whose heads, losses, sampling, batch sizes and phases are used ({default})",
    )
    train.add_argument("--method", choices=METHODS, default="pcgrad", help=f"method of combining tasks ({default})")
    _add_common(train)
    train.add_argument("--heads", nargs=len(TASKS), metavar="NAME", help=f"heads, {per_task}")
    train.add_argument("--similarity", choices=LOSSES["sts"], help="loss of sts (default: the scheme's)")
    train.add_argument("--epochs", type=_positive, default=10, metavar="N", help=f"epochs of each phase ({default})")
    train.add_argument("--steps", type=_positive, metavar="N", help="steps per epoch (default: one pass over the data)")
    train.add_argument("--batch-sizes", type=_positive, nargs=len(TASKS), metavar="N", help=f"batch sizes, {per_task}")
    train.add_argument(
        "--max-length", type=_positive, default=128, metavar="N", help=f"most tokens of a sentence ({default})"
    )
    train.add_argument("--lr", type=_rate, metavar="RATE", help="learning rate (default: the scheme's, for BERT-base)")
    train.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        default="adamw",
        help=f"torch's AdamW, or gradkern's with the fused step ({default})",
    )
    train.add_argument("--sampling", choices=SAMPLINGS, help="tasks that a step trains (default: the scheme's)")
    train.add_argument(
        "--task-weights",
        type=_rate,
        nargs=len(TASKS),
        metavar="W",
        help="weights of the losses for --method unitary (default: 1)",
    )
    train.add_argument(
        "--suppression", type=_share, metavar="P", help="share of the shared gradient's entries to drop (default: none)"
    )
    train.add_argument(
        "--dropout", type=_share, default=0.1, metavar="P", help=f"dropout in BERT and heads ({default})"
    )
    train.add_argument("--amp", action="store_true", help="run forward passes under autocast to bfloat16")
    train.add_argument("--seed", type=_integer, default=0, metavar="N", help=f"seed of all random choices ({default})")
    train.add_argument(
        "--judged", type=_positive, metavar="N", help="dev examples of each task to evaluate on (default: all)"
    )
    train.add_argument(
        "--patience", type=_positive, metavar="N", help="end a phase after N epochs without a better score"
    )
    train.add_argument("--resume", action="store_true", help="continue the interrupted run in --out")

    experiments = commands.add_parser(
        "suite",
        help="run all experiments",
        description="Run each report's experiment, then report on all. Runs that are complete in --out are skipped.",
    )
    experiments.set_defaults(command=_suite)
    _add_common(experiments)
    experiments.add_argument(
        "--small", action="store_true", help="small size: under half an hour on two cores with --weights minilm"
    )

    reporting = commands.add_parser(
        "report",
        help="write tables and figures",
        description="Write tables and figures that compare runs, and print the tables.",
    )
    reporting.set_defaults(command=_report)
    reporting.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run, or a folder of such")
    reporting.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"folder to write to ({default})")
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    default = "default %(default)s"
    parser.add_argument(
        "--data", metavar="DIR", help="folder with ids-sst-*, quora-* and sts-*.csv (default: synthetic sentences)"
    )
    parser.add_argument("--skip-malformed", action="store_true", help="skip malformed rows of the data and list them")
    parser.add_argument(
        "--weights",
        default="random",
        help=f"minilm, a folder in Hugging Face's BERT layout, or random for a small random encoder ({default})",
    )
    parser.add_argument(
        "--device", type=lambda text: str(parse_device(text)), default="cpu", help=f"cpu, cuda or cuda:N ({default})"
    )
    parser.add_argument("--out", type=Path, default=OUT, metavar="DIR", help=f"folder to write to ({default})")


def _integer(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0")
    return int(text)


def _positive(text: str) -> int:
    if _integer(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not positive")
    return int(text)


def _rate(text: str) -> float:
    return _number(text, lambda value: value > 0, "a positive number")


def _share(text: str) -> float:
    return _number(text, lambda value: 0 <= value < 1, "a number from 0 to below 1")


def _number(text: str, is_valid: Callable[[float], bool], valid: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not is_valid(value) or value == float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not {valid}")
    return value


if __name__ == "__main__":
    sys.exit(main())

"""The command line: ``gradkern demo``, ``gradkern methods``, ``gradkern info`` and ``gradkern tune``.

Arguments are read here, the work is done elsewhere.
"""

import argparse
import importlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import gradkern
from gradkern.aggregators import listing
from gradkern.aggregators.by_name import one_of
from gradkern.demo.methods import METHODS
from gradkern.ops.devices import GPU

DEMO_EXTRA = ("matplotlib", "rich", "sklearn")
"""The packages that the demo imports and a base install lacks."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on ``argv`` (default: this process's arguments) and return the exit status."""
    args = _parser().parse_args(argv)
    try:
        return {"demo": _demo, "methods": _methods, "info": _info, "tune": _tune}[args.command](args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130  # the status that a shell reports for a process that SIGINT ended


def _demo(args: argparse.Namespace) -> int:
    try:
        for name in DEMO_EXTRA:
            importlib.import_module(name)
    except ImportError as error:
        print(f'gradkern demo needs {error.name}: pip install "gradkern[demo]"', file=sys.stderr)
        return 1
    from gradkern.demo.run import run

    methods = [name for name in METHODS if name in args.method or "all" in args.method]
    run(methods, list(dict.fromkeys(args.seeds)), args.epochs, args.device, args.out)
    return 0


def _methods(args: argparse.Namespace) -> int:
    print(json.dumps(listing.data(), indent=1, ensure_ascii=False) if args.json else listing.text())
    return 0


def _info(args: argparse.Namespace) -> int:
    from gradkern.check.selfcheck import info

    return info()


def _tune(args: argparse.Namespace) -> int:
    from gradkern.tuning.command import tune

    return tune(args.device, args.minutes, args.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gradkern", description=gradkern.__doc__)
    parser.add_argument("--version", action="version", version=f"gradkern {gradkern.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo",
        help="compare methods on overlaid digits",
        description="Train on pairs of overlaid digits, three tasks at once, and compare methods over the same seeds.",
    )
    demo.add_argument(
        "--method",
        nargs="+",
        type=_method,
        default=["all"],
        metavar="METHOD",
        help=f"{', '.join(METHODS)}; or all (default: all)",
    )
    demo.add_argument(
        "--epochs", type=_positive, default=3, metavar="N", help="passes over the training pairs (default: %(default)s)"
    )
    demo.add_argument(
        "--seeds", nargs="+", type=_seed, default=[0, 1, 2], metavar="N", help="one run for each seed (default: 0 1 2)"
    )
    demo.add_argument(
        "--device", type=_device, default=_default_device(), help="cpu, cuda or cuda:N (default: %(default)s)"
    )
    demo.add_argument(
        "--out",
        type=_folder,
        default="demo-out",
        metavar="DIR",
        help="the folder for tables and plots (default: %(default)s)",
    )

    methods = commands.add_parser(
        "methods",
        help="every method: its class, what it needs, what it costs, its paper",
        description="List every method with its class, what it looks at, what it costs in words, its state and paper.",
    )
    methods.add_argument("--json", action="store_true", help="as JSON, with the papers' titles")

    commands.add_parser(
        "info",
        help="versions, devices, back ends, and a self-check",
        description="Show versions, devices and back ends, and check every operator; the exit status says if all work.",
    )

    tune = commands.add_parser(
        "tune",
        help="check and measure launch settings on a device, and keep the fastest in a table",
        description="Check launch settings against the reference and measure them. Keep those that are faster than the "
        "defaults in a table, which later processes on the same card read.",
    )
    tune.add_argument(
        "--device", type=_device, default=_default_device(), help="cpu, cuda or cuda:N (default: %(default)s)"
    )
    tune.add_argument(
        "--minutes", type=_minutes, default=3.0, metavar="N", help="the time for all of it (default: %(default)g)"
    )
    tune.add_argument(
        "--out",
        type=_file,
        metavar="FILE",
        help="the table (default: what GRADKERN_TUNING names, else a file in the user's cache directory)",
    )
    return parser


def _method(text: str) -> str:
    try:
        return one_of(["all", *METHODS], text, "METHOD")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to 2**63 - 1")
    return int(text)


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a device") from None
    if device.type not in ("cpu", GPU):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a CPU nor a CUDA device")
    present = torch.cuda.device_count() if device.type == GPU else 1
    if (device.index or 0) >= present:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not on this machine, which has {present} {device.type} device(s)"
        )
    return device


def _default_device() -> str:
    return GPU if torch.cuda.is_available() else "cpu"


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return minutes


def _file(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a file")
    return Path(text)


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder")
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder: {error.strerror}") from None
    return Path(text)

"""The command line of first contact."""

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from bench.first_contact import checkout
from bench.first_contact.course import Course, NoDevice
from bench.first_contact.plan import CARD, DRY, SUMMARY, earlier_results, plan

INTERRUPTED = 130
"""The status that a shell reports for a process that SIGINT ended."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Check and measure on an NVIDIA GPU what no machine without one can tell.

    The exit status is 0 if all steps passed, 1 if any did not, and 130 after an interrupt. An interrupt loses no
    finished step.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    if earlier := earlier_results(options.out):
        parser.error(f"--out {options.out} has results of an earlier run ({', '.join(earlier)}): name another folder")
    checkout.link_kernels()
    device, out = DRY if options.dry else CARD, options.out
    steps = [step for step in plan(device, out) if step.name in options.only]
    course = Course(steps, out, device, options.minutes)
    try:
        course.run(partial(print, flush=True))
    except NoDevice as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: what was found is in {out}")
        return INTERRUPTED
    print(f"\n{(out / SUMMARY[1]).read_text()}\nWritten to {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")
    return 0 if course.ok else 1


def interrupt_on_signals() -> None:
    """Let every signal that ends this process end the step's processes too, behind a shell's "&" as well.

    A terminal that closes does not end it under ``nohup``.
    """
    ends = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        ends.append(signal.SIGHUP)
    for number in ends:
        signal.signal(number, signal.default_int_handler)


def _parser() -> argparse.ArgumentParser:
    names = [step.name for step in plan(CARD, Path())]
    steps = f"some steps only, of {', '.join(names)}"
    parser = argparse.ArgumentParser(prog="python -m bench.first_contact", description=main.__doc__)
    parser.add_argument("--out", type=_folder, default="bench-out", help="results folder (default bench-out)")
    parser.add_argument("--dry", action="store_true", help="try the steps without a GPU, on small inputs")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STEP", help=steps)
    parser.add_argument("--minutes", type=_minutes, default=9.0, help="time for everything together (default 9)")
    return parser


def _folder(text: str) -> Path:
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=text):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no folder for results: {error.strerror}") from None
    return Path(text).absolute()


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


if __name__ == "__main__":
    interrupt_on_signals()
    sys.exit(main())

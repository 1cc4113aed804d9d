"""The steps of first contact, in the order in which they decide most, and their limits: one table."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from bench.first_contact.child import ROOT

CARD, DRY = "cuda:0", "cpu"
"""The device of the steps, and the one that takes its place in a dry run, where all inputs are small."""

WORKERS = min(12, os.cpu_count() or 1)
"""Processes that test or compile at once. Compiling takes longer than all else, and each worker has a context of the
GPU."""

KERNELS = ("tests/kernels", "tests/ops/one_launch", "tests/ops/test_launch_cost.py")
"""The kernels' tests, which come first."""

TUNE_MINUTES = {CARD: "1.5", DRY: "0.1"}
"""Less than the step may take, since a check that has begun is finished."""
PATIENCE = {CARD: 1, DRY: 3}
"""Multiples of the limits: a dry run is often on a slow or busy machine. All steps together have the same time."""


class Step(NamedTuple):
    """A step: what is called, and what it may take.

    Attributes:
        limit: the most seconds that it may take.
        files: the files that it writes.
        command: the arguments of Python.
        decides: what its result decides, in words.
    """

    name: str
    limit: float
    files: tuple[str, ...]
    command: tuple[str, ...]
    decides: str


GATE = "smoke"
"""The step without which no other makes sense."""
SUMMARY = ("summary.json", "summary.md")


def plan(device: str, out: Path) -> list[Step]:
    """Return all steps on a device. Their files, with the summary's two, are eight, and their limits nine minutes."""

    def ours(module: str) -> tuple[str, ...]:
        return ("-m", f"bench.first_contact.{module}", device, str(out))

    steps = [
        Step("smoke", 70, (), ours("smoke"), "whether the kernels are right at all"),
        Step("tests", 100, ("tests.json",), _pytest(device, out), "whether they are right in all cases"),
        Step("sanitizer", 60, ("tools.txt",), ours("sanitizer"), "whether they read or race where no result shows it"),
        Step("tune", 135, ("tuning.json",), _tune(device, out), "the launch settings"),
        Step("sweep", 50, ("sweep.json",), ours("sweep"), "how far the kernels are from the memory's bandwidth"),
        Step("one-launch", 30, ("sweep.json",), ours("one_launch"), "where one launch beats three"),
        Step("step", 55, ("step.json",), _step(device, out), "what a training step gains"),
        Step("host", 20, ("host.json",), ours("host"), "whether the host keeps up, and whether gradients are copied"),
        Step("ncu", 20, ("tools.txt",), ours("ncu"), "what limits the combination"),
    ]
    return [step._replace(limit=PATIENCE[device] * step.limit) for step in steps]


def python(command: tuple[str, ...]) -> list[str]:
    """Return a command of this interpreter."""
    return [sys.executable, *command]


def _pytest(device: str, out: Path) -> tuple[str, ...]:
    # "=" keeps pytest from taking the file of results for one of tests, and its folder for the root of all tests.
    command = ("-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "bench.first_contact.card_tests")
    command += (f"--device-under-test={device}", f"--report-to={out / 'tests.json'}")
    command += ("-p", "no:cacheprovider", "--tb", "short")
    if find_spec("xdist"):
        command += ("-n", str(WORKERS))
    if find_spec("pytest_timeout"):
        # A hanging kernel blocks the main thread, so a signal would not end its test; a thread ends the worker.
        command += ("--timeout", "60", "--timeout-method", "thread")
    return command + (("--first-of-file", "1", *KERNELS) if device == DRY else ())


def _tune(device: str, out: Path) -> tuple[str, ...]:
    call = "import sys; from gradkern.cli import main; sys.exit(main(sys.argv[1:]))"  # nothing need be installed
    file = str(out / "tuning.json")
    return ("-c", call, "tune", "--device", device, "--minutes", TUNE_MINUTES[device], "--out", file)


def _step(device: str, out: Path) -> tuple[str, ...]:
    size, seconds = ("tiny", "0.1") if device == DRY else ("bert-base", "3")
    return ("-m", "bench.step", "--size", size, "--seconds", seconds, "--device", device, "--out", str(out))


def earlier_results(out: Path) -> list[str]:
    """Return the names of the files in a folder that a run would write over."""
    names = {*SUMMARY, *(name for step in plan(CARD, out) for name in step.files)}
    return sorted(name for name in names if (out / name).exists())

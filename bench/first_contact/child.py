"""One child process under a time limit. However it ends, nothing of its process group is left."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).parents[2]
PASSED, FAILED, LATE, SKIPPED, NOT_RUN = "passed", "failed", "out of time", "skipped", "not run"
SKIP = 77
"""The exit status of a child that cannot run here, as of automake's tests; its last line says why."""
GRACE = 3.0
"""Seconds of the limit that a child has to write what it found, after an interrupt. It is then killed."""
TAIL = 30
"""Lines of output that a summary keeps of a child that did not pass."""
READ = 1 << 16
"""Bytes of output that are read, the last ones: a child may print gigabytes."""


class Outcome(NamedTuple):
    """How a child ended.

    Attributes:
        message: its last line of output, or the reason.
        tail: its last lines of output, if it did not pass.
    """

    status: str
    seconds: float
    message: str
    tail: tuple[str, ...] = ()


def run(command: Sequence[str], limit: float, environment: Mapping[str, str]) -> Outcome:
    """Run a command from the checkout's folder and return how it ended, after ``limit`` seconds at the latest.

    An exception, such as KeyboardInterrupt, ends the child too.
    """
    start = time.monotonic()
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a process group of its own
        )
        try:
            code: int | None = child.wait(max(0.0, limit - GRACE))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(child)
        return _outcome(code, time.monotonic() - start, _lines(log))


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child's group: by an interrupt if it still runs, then by force, and also what it left behind."""
    try:
        if child.poll() is None:
            _signal(child, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                child.wait(GRACE)
    finally:  # a second interrupt comes while it waits
        _signal(child, signal.SIGKILL)
        child.wait()


def _signal(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # all have ended
        os.killpg(child.pid, number)


def _lines(log: IO[bytes]) -> list[str]:
    log.seek(max(0, log.seek(0, os.SEEK_END) - READ))
    return [line.rstrip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]


def _outcome(code: int | None, seconds: float, lines: list[str]) -> Outcome:
    last = lines[-1] if lines else "no output"
    if code == 0:
        return Outcome(PASSED, seconds, last)
    if code == SKIP:
        return Outcome(SKIPPED, seconds, last)
    tail = tuple(lines[-TAIL:])
    if code is None:
        return Outcome(LATE, seconds, f"ended after {seconds:.0f} s", tail)
    reason = last if code > 0 else f"ended by {signal.Signals(-code).name}"
    return Outcome(FAILED, seconds, reason, tail)

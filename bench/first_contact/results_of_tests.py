"""The results of a run of pytest as a small JSON file, which is whole and up to date while the run goes on."""

import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

FAILURES, LONGEST, LETTERS = 100, 15, 1500
"""Most failures with a message, tests with a time, and letters of a message."""
EVERY = 1.0
"""Seconds between two writes."""


class Report:
    """A plugin that counts results.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[str] = Counter(passed=0, failed=0, skipped=0)
        self.reasons: Counter[str] = Counter()
        self.failures: list[dict[str, str]] = []
        self.seconds: Counter[str] = Counter()
        self.written = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count the report of a test's part: setup, call or teardown."""
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.counts["failed"] += 1
            self._note(report.nodeid if report.when == "call" else f"{report.nodeid}, {report.when}", report)
        elif report.skipped:
            self.counts["skipped"] += 1
            self.reasons[_reason(report)] += 1
        elif report.when == "call":
            self.counts["passed"] += 1
        if time.monotonic() - self.written > EVERY:
            self._write(finished=False)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note files that cannot be imported as failures."""
        if report.failed:
            self.counts["failed"] += 1
            self._note(report.nodeid, report)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Write the results of all."""
        self._write(finished=exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED))

    def _note(self, name: str, report: pytest.TestReport | pytest.CollectReport) -> None:
        if len(self.failures) < FAILURES:
            self.failures.append({"test": name, "message": report.longreprtext[-LETTERS:]})

    def _write(self, finished: bool) -> None:
        results: dict[str, Any] = dict(self.counts) | {
            "finished": finished,
            "failures": self.failures,
            "skipped because": dict(self.reasons.most_common()),
            "longest": {name: round(t, 2) for name, t in self.seconds.most_common(LONGEST)},
        }
        whole = self.path.with_name(f".{self.path.name}")
        whole.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(whole, self.path)
        self.written = time.monotonic()


def _reason(report: pytest.TestReport) -> str:
    """Return why a test was skipped, without its place."""
    longrepr = report.longrepr
    reason = str(longrepr[2]) if isinstance(longrepr, tuple) else str(longrepr)
    return reason.removeprefix("Skipped: ")

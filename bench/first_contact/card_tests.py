"""A pytest plugin: of all tests those that a GPU decides, the kernels' first, and their results as JSON.

``pytest -p bench.first_contact.card_tests --device-under-test cuda:0 --report-to FILE`` selects

- the tests of the kernels, except those of builds for other GPUs;
- the tests that run once on each device, on this device alone;
- the tests that are skipped without a GPU.
"""

import os
from pathlib import Path

import pytest
import torch

from bench.first_contact.plan import KERNELS
from bench.first_contact.results_of_tests import Report

ELSEWHERE = ("tests/kernels/test_aot.py", "tests/distributed/")
"""Builds for other GPUs, and tests with processes of their own."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the plugin's options."""
    parser.addoption("--device-under-test", default="cuda:0", help="the device that decides")
    parser.addoption("--report-to", type=Path, required=False, help="file of results, as JSON")
    parser.addoption("--first-of-file", type=int, help="select that many tests of each file only")


def pytest_configure(config: pytest.Config) -> None:
    """Report from the process that hears of all tests; the workers of pytest-xdist watch their device."""
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(DeviceWatch())
    else:
        config.pluginmanager.register(Report(config.getoption("--report-to")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep what the device decides, the kernels' tests first."""
    kind = torch.device(config.getoption("--device-under-test")).type
    chosen = [item for item in items if decided_by(item, kind)]
    if (n := config.getoption("--first-of-file")) is not None:
        chosen = _first_of_each_file(chosen, n)
    chosen.sort(key=lambda item: not item.nodeid.startswith(KERNELS))
    kept = set(chosen)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = chosen


def decided_by(item: pytest.Item, kind: str) -> bool:
    """Return whether a device of that kind decides the test."""
    if item.nodeid.startswith(ELSEWHERE):
        return False
    if item.nodeid.startswith(KERNELS):
        return True
    callspec = getattr(item, "callspec", None)
    if callspec is not None and callspec.params.get("device") == kind:
        return True
    return kind == "cuda" and any(map(_asks_for_a_gpu, item.iter_markers("skipif")))


def _asks_for_a_gpu(skipif: pytest.Mark) -> bool:
    """Return whether a test is skipped without a GPU, and is not skipped here."""
    return "GPU" in str(skipif.kwargs.get("reason")) and not any(skipif.args)


def _first_of_each_file(items: list[pytest.Item], n: int) -> list[pytest.Item]:
    seen: dict[Path, int] = {}
    chosen = []
    for item in items:
        seen[item.path] = seen.get(item.path, 0) + 1
        if seen[item.path] <= n:
            chosen.append(item)
    return chosen


class DeviceWatch:
    """Ends a worker whose device is out of order, because every later test of its process would fail as well.

    The test has been reported by then. pytest-xdist reports it once more, as one that crashed, and starts a new worker.
    """

    def pytest_runtest_logfinish(self) -> None:
        """Wait for the device after each test, so that its errors are those of this test."""
        if torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                os._exit(1)

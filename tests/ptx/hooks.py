"""What a run of pytest with ``--ptx`` tells at its end: which kernels were executed from PTX, and how much of them."""

from typing import Any

import pytest

from tests.ptx import machine

_of_workers: list[dict[str, machine.Ran]] = []


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand a worker's counts over to the process that started it."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["ptx"] = {name: (ran.launches, ran.instructions) for name, ran in machine.ran().items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take a worker's counts."""
    counts = getattr(node, "workeroutput", {}).get("ptx", {})
    _of_workers.append({name: machine.Ran(*count) for name, count in counts.items()})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the counts of this process and of all workers."""
    total: dict[str, machine.Ran] = {}
    for counts in (machine.ran(), *_of_workers):
        for name, ran in counts.items():
            total.setdefault(name, machine.Ran()).add(ran)
    terminalreporter.write_line(f"Kernels executed from PTX: {len(total)}")
    for name, ran in sorted(total.items()):
        terminalreporter.write_line(f"  {name}: {ran.launches} launches, {ran.instructions:,} instructions")

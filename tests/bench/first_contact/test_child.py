"""A child under a time limit: how it ended, and that nothing of it is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.first_contact import child
from bench.first_contact.child import FAILED, LATE, PASSED, SKIP, SKIPPED, run

LONG = 60.0


@pytest.fixture(autouse=True)
def _children_heed_interrupts() -> Iterator[None]:
    """Heed interrupts, as the command does: a shell has processes behind its "&", and their children, ignore them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("print('first'); print('last'); print()", PASSED, "last"),
        ("", PASSED, "no output"),
        (f"print('no such tool'); raise SystemExit({SKIP})", SKIPPED, "no such tool"),
        ("import sys; print('out'); sys.exit('wrong')", FAILED, "wrong"),
        ("import os; os.kill(os.getpid(), 11)", FAILED, "ended by SIGSEGV"),
    ],
)
def test_how_a_child_ends(code: str, status: str, message: str) -> None:
    outcome = run(python(code), LONG, {})
    assert (outcome.status, outcome.message) == (status, message)


def test_a_failure_keeps_its_last_lines() -> None:
    outcome = run(python("for k in range(100): print(k)\nraise SystemExit(1)"), LONG, {})
    assert outcome.tail == tuple(str(k) for k in range(100 - child.TAIL, 100))
    assert run(python("print(1)"), LONG, {}).tail == ()


def test_of_a_flood_the_end_is_kept() -> None:
    outcome = run(python(f"print('x' * {4 * child.READ}); print('last'); raise SystemExit(1)"), LONG, {})
    assert outcome.message == "last"
    assert sum(map(len, outcome.tail)) <= child.READ


def test_the_environment_is_added_to() -> None:
    code = "import os; print(os.environ['ADDED'], 'PATH' in os.environ)"
    assert run(python(code), LONG, {"ADDED": "yes"}).message == "yes True"


def test_a_child_that_is_late_may_write_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import time\ntry: print('ready', flush=True); time.sleep(60)\nexcept KeyboardInterrupt: print('saved')"
    outcome = run(python(code), child.GRACE + 2, {})
    assert outcome.status == LATE
    assert outcome.tail == ("ready", "saved")


def test_a_time_out_ends_the_whole_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither process heeds an interrupt, and the child's own child also outlives its parent's end."""
    monkeypatch.setattr(child, "GRACE", 0.5)
    ids = tmp_path / "ids"
    deaf = "import os, signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    inner = deaf + f"open({str(ids)!r}, 'a').write(f'{{os.getpid()}} '); time.sleep(60)"
    outer = deaf + f"subprocess.Popen([sys.executable, '-c', {inner!r}]); time.sleep(60)"
    start = time.monotonic()
    outcome = run(python(outer), 5, {})
    assert outcome.status == LATE
    assert time.monotonic() - start < 30  # and not 60; a busy machine may be slow
    assert_gone(ids)


def test_what_a_child_leaves_behind_is_ended(tmp_path: Path) -> None:
    ids = tmp_path / "ids"
    inner = f"import os, time; open({str(ids)!r}, 'a').write(f'{{os.getpid()}} '); time.sleep(60)"
    outer = (
        f"import os, subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {inner!r}])\n"
        f"while not os.path.exists({str(ids)!r}): time.sleep(0.01)\nprint('done')"
    )
    assert run(python(outer), LONG, {})[:1] == (PASSED,)
    assert_gone(ids)


def test_a_second_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes while a child that heeds no interrupt has time to end."""
    ids = tmp_path / "ids"
    deaf = f"""
import os, signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
open({str(ids)!r}, "a").write(str(os.getpid()))
time.sleep(60)
"""

    def interrupted(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if timeout is None:
            return waited(process)
        while not (ids.exists() and ids.read_text()):
            time.sleep(0.01)
        raise KeyboardInterrupt

    waited = subprocess.Popen.wait
    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(python(deaf), LONG, {})
    assert_gone(ids)


def assert_gone(ids: Path) -> None:
    for text in ids.read_text().split():
        for _ in range(500):  # a killed process stays until its new parent has noticed
            if not running(int(text)):
                break
            time.sleep(0.01)
        else:
            pytest.fail(f"{text} still runs")


def running(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{number}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")

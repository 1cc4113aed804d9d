"""The course of first contact: what runs after what, and what is left of it whatever happens."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.first_contact import __main__ as command
from bench.first_contact import course as courses
from bench.first_contact.child import FAILED, LATE, NOT_RUN, PASSED, SKIP, SKIPPED
from bench.first_contact.course import Course
from bench.first_contact.plan import DRY, GATE, SUMMARY, Step

OK, WRONG, SKIPS = "print('fine')", "import sys; print('before'); sys.exit('broken')", f"raise SystemExit({SKIP})"
MACHINE = {"model": "a card", "versions": {"torch": "2.11"}, "card": {"nvidia-smi": {"driver_version": "600.1"}}}


LOOKED_UP = Course._machine
"""The function, which each test replaces."""


def step(name: str, code: str, limit: float = 60.0) -> Step:
    return Step(name, limit, (), ("-c", code), "nothing")


@pytest.fixture(autouse=True)
def _known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Course, "_machine", lambda course: MACHINE)


def course_of(tmp_path: Path, *steps: Step, minutes: float = 5.0) -> Course:
    return Course(steps, tmp_path / "new" / "out", DRY, minutes)


def statuses(course: Course) -> dict[str, str]:
    """Return the status of each step as the file has it."""
    return {of["name"]: of["status"] for of in saved(course)["steps"]}


def saved(course: Course) -> dict[str, Any]:
    return json.loads((course.out / SUMMARY[0]).read_text())


def test_a_failing_step_does_not_stop_the_others(tmp_path: Path) -> None:
    course = course_of(tmp_path, step(GATE, OK), step("a", WRONG), step("b", OK), step("c", SKIPS), step("d", OK))
    said: list[str] = []
    course.run(said.append)
    assert statuses(course) == {GATE: PASSED, "a": FAILED, "b": PASSED, "c": SKIPPED, "d": PASSED}
    assert not course.ok
    text = (course.out / SUMMARY[1]).read_text()
    assert "before\nbroken\n" in text
    assert "| a | nothing | failed |" in text
    assert "a card; torch 2.11; driver 600.1" in text
    assert any(line.startswith("a: failed") and line.endswith("broken") for line in said)


def test_a_skipped_step_is_no_failure(tmp_path: Path) -> None:
    course = course_of(tmp_path, step("a", OK), step("b", SKIPS))
    course.run(lambda text: None)
    assert course.ok


def test_nothing_runs_after_a_gate_that_failed(tmp_path: Path) -> None:
    course = course_of(tmp_path, step(GATE, WRONG), step("a", OK), step("b", OK))
    course.run(lambda text: None)
    assert statuses(course) == {GATE: FAILED, "a": NOT_RUN, "b": NOT_RUN}
    assert not course.ok


def test_a_late_gate_lets_the_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courses.child, "GRACE", 0.1)
    course = course_of(tmp_path, step(GATE, "import time; time.sleep(60)", 1.0), step("a", OK))
    course.run(lambda text: None)
    assert statuses(course) == {GATE: LATE, "a": PASSED}
    assert not course.ok


def test_limits_are_cut_to_the_time_that_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits, now = [], [0.0]

    def run(arguments: list[str], limit: float, environment: dict[str, str]) -> courses.Outcome:
        limits.append(limit)
        now[0] += limit
        return courses.Outcome(LATE, limit, "late")

    monkeypatch.setattr(courses.child, "run", run)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    course = course_of(tmp_path, *(step(name, OK, 50.0) for name in "abcd"), minutes=2)
    course.run(lambda text: None)
    assert limits == [50.0, 50.0, 20.0]
    assert [course.found[name].status for name in "abcd"] == [LATE, LATE, LATE, NOT_RUN]
    assert not course.ok


def test_a_folder_with_results_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        command.main(["--dry", "--out", str(tmp_path)])
    assert stopped.value.code == 2
    assert "has results of an earlier run (sweep.json)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]


def test_an_interrupt_before_the_first_step_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(command: list[str], limit: float, environment: dict[str, str]) -> courses.Outcome:
        Path(command[-1]).write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(Course, "_machine", LOOKED_UP)
    monkeypatch.setattr(courses.child, "run", interrupted)
    course = course_of(tmp_path, step("a", OK))
    with pytest.raises(KeyboardInterrupt):
        course.run(lambda text: None)
    assert not list(course.out.iterdir())


def test_children_see_this_checkout_and_no_settings_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    environment = course_of(tmp_path).environment()
    first, last = environment["PYTHONPATH"].split(os.pathsep)
    assert (Path(first) / "gradkern" / "__init__.py").exists()
    assert last == "elsewhere"
    assert environment["GRADKERN_TUNING"] == "off"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in Course((), tmp_path, "cuda:0", 1.0).environment()


INTERRUPTED = """
import sys
from bench.first_contact import __main__ as command
from bench.first_contact.course import Course
from bench.first_contact.plan import Step
Course._machine = lambda course: {}
codes = {"first": "print('found')", "second": "import time; time.sleep(60)"}
command.plan = lambda device, out: [Step(name, 60, (), ("-c", code), "") for name, code in codes.items()]
command.interrupt_on_signals()
sys.exit(command.main(["--dry", "--out", sys.argv[1]]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_loses_no_finished_step(number: signal.Signals, tmp_path: Path) -> None:
    """Other signals that end the process are interrupts too, that of a terminal that closes among them."""
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored here, as under nohup")
    code = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    process = subprocess.Popen(code, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("second:"):
            break
    process.send_signal(number)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == command.INTERRUPTED == 130
    assert "interrupted" in rest
    steps = json.loads((tmp_path / SUMMARY[0]).read_text())["steps"]
    assert [(of["status"], of["message"]) for of in steps] == [(PASSED, "found"), (NOT_RUN, "not yet")]

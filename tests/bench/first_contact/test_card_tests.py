"""The plugin that selects what a GPU decides, and its file of results."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.first_contact.card_tests import decided_by
from bench.first_contact.checkout import ROOT

NEEDS_GPU = pytest.mark.skipif(False, reason="no GPU on this machine").mark  # as it is where there is one
INTERPRETED = pytest.mark.skipif(True, reason="with a GPU the kernels are compiled, not interpreted").mark


def item(nodeid: str, device: str | None = None, marks: tuple[Any, ...] = ()) -> Any:
    """Return a test as pytest collects it."""
    callspec = SimpleNamespace(params={} if device is None else {"device": device})
    return SimpleNamespace(nodeid=nodeid, callspec=callspec, iter_markers=lambda name: marks)


@pytest.mark.parametrize(
    ("of", "on_card", "on_cpu"),
    [
        (item("tests/kernels/test_kernels.py::test_gramian"), True, True),
        (item("tests/ops/one_launch/test_one_launch.py::test_pcgrad"), True, True),
        (item("tests/kernels/test_aot.py::test_builds"), False, False),
        (item("tests/distributed/test_dtensors.py::test_a", marks=(NEEDS_GPU,)), False, False),
        (item("tests/step/test_backward.py::test_a[cuda]", "cuda"), True, False),
        (item("tests/step/test_backward.py::test_a[cpu]", "cpu"), False, True),
        (item("tests/optim/test_adamw.py::test_a", marks=(NEEDS_GPU,)), True, False),
        (item("tests/optim/test_adamw.py::test_b"), False, False),
        (item("tests/optim/test_adamw.py::test_c", marks=(INTERPRETED,)), False, False),
    ],
)
def test_what_a_device_decides(of: Any, on_card: bool, on_cpu: bool) -> None:
    assert decided_by(of, "cuda") == on_card
    assert decided_by(of, "cpu") == on_cpu


TESTS = """
import os, time
import pytest

@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("k", range(4))
def test_passes(device, k):
    assert k == 3 or device == "cpu"

@pytest.mark.parametrize("device", ["cpu"])
def test_fails(device):
    assert device == "cuda", "the message"

@pytest.mark.parametrize("device", ["cpu"])
def test_skips(device):
    pytest.skip("no such thing")

@pytest.fixture
def broken():
    raise RuntimeError("in the fixture")

@pytest.mark.parametrize("device", ["cpu"])
def test_cannot_start(device, broken):
    pass

@pytest.mark.parametrize("device", ["cpu"])
def test_dies(device):
    if "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(3)

def test_of_no_device():
    assert False
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_the_results_of_a_run(workers: int, tmp_path: Path) -> None:
    if workers and find_spec("xdist") is None:
        pytest.skip("pytest-xdist is not installed")
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "test_missing.py").write_text("import a_package_that_is_not_there")
    report = tmp_path / "tests.json"
    command = [sys.executable, "-m", "pytest", "-p", "bench.first_contact.card_tests", "--device-under-test", "cpu"]
    command += ["--report-to", str(report), "--rootdir", str(tmp_path), "-c", str(tmp_path / "pytest.ini")]
    command += ["--continue-on-collection-errors", *(["-n", str(workers)] if workers else []), str(tmp_path)]
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}  # not its worker
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    found = json.loads(report.read_text())
    messages = {failure["test"].rpartition("::")[2]: failure["message"] for failure in found["failures"]}
    names = {"test_missing.py", "test_fails[cpu]", "test_cannot_start[cpu], setup"}
    assert {name for name in messages if not name.startswith("test_dies")} == names
    assert "the message" in messages["test_fails[cpu]"]
    assert "a_package_that_is_not_there" in messages["test_missing.py"]
    assert found["passed"] == (4 if workers else 5)
    assert found["failed"] == len(messages) == (4 if workers else 3)
    assert found["skipped"] == 1
    assert found["skipped because"] == {"no such thing": 1}
    assert found["finished"]
    assert len(found["longest"]) >= 8

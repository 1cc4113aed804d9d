"""Fixtures that all tests share, and the option ``--ptx``.

Triton must know before its first import whether kernels are to be interpreted.
"""

import importlib.util
import os
import sys

import torch

from tests.ptx import option

if not torch.cuda.is_available() and not option.wanted():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["GRADKERN_TUNING"] = "off"  # a table of this machine's would change bits and launches

from collections.abc import Iterator

import pytest

from tests import interpreter

if importlib.util.find_spec("hypothesis"):  # without hypothesis, the tests that do not need it still run
    from hypothesis import settings

    settings.register_profile("any machine", deadline=None)  # a busy machine may be slow at any time
    settings.load_profile("any machine")

SLOW = {"advice", "bench", "check", "compat", "demo", "distributed", "examples", "kernels", "one_launch", "recipes"}
SLOW |= {"test_bits.py", "test_readme.py", "test_package.py", "test_docs.py"}
SLOW |= {"solvers", "gramian", "history", "wrappers", "arguments", "test_out.py"}
SLOW |= {"test_every_method.py", "test_no_host_reads.py", "test_layer_kinds.py", "test_random_graphs.py"}
SLOW |= {"test_uses.py", "test_precision.py", "test_sketch.py", "test_through_features.py"}
SLOW |= {"test_attention.py", "test_default_device.py", "tuning", "ptx"}
"""Folders and files of tests that run whole programs, other libraries, kernels in Triton's interpreter, or many cases
of all methods or layers."""


pytest_addoption = option.add


def pytest_configure(config: pytest.Config) -> None:
    """With ``--ptx``, let an emulated GPU run all launches."""
    if option.wanted():
        option.start(config)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the fast tests: those outside of the slow folders and files that do not run the interpreter."""
    for item in items:
        if SLOW.isdisjoint(item.path.parts) and "triton" not in item.name and "kernel" not in item.name:
            item.add_marker(pytest.mark.fast)


DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Give every device of this machine in turn: a test that asks for it runs once on each."""
    return torch.device(request.param)


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    """Make new tensors, and so new modules' parameters, float64 during the test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def triton_serves_the_cpu() -> Iterator[list[str]]:
    """Let the kernels serve CPU tensors during the test, and give the list of operators they have served so far."""
    why_not = interpreter.why_not()
    if why_not is not None:
        pytest.skip(why_not)
    with interpreter.serving_the_cpu() as calls:
        yield calls


@pytest.fixture(params=["pytorch", pytest.param("triton", marks=interpreter.interpreted)])
def back_end(request: pytest.FixtureRequest) -> str:
    """Let each back end in turn serve CPU tensors: a test that asks for it runs on both."""
    if request.param == "triton":
        request.getfixturevalue("triton_serves_the_cpu")
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _accelerate_starts_anew() -> Iterator[None]:
    """Reset Accelerate's settings, which belong to the whole process."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()

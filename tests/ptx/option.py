"""The option ``pytest --ptx[=80|90]``: Triton compiles the kernels for such a GPU, and the emulator runs the result.

It must be known before Triton is imported, so it is read from the command line. Processes that the tests start read it
from the environment.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.ptx import build

VARIABLE = "GRADKERN_PTX"
ARCHS = ("80", "90")
PROGRAMS = 5
"""How many programs the one launch has."""

OPTION: dict[str, Any] = {
    "nargs": "?",
    "const": ARCHS[-1],
    "choices": ARCHS,
    "help": "run kernels on an emulator of PTX, as Triton compiles them for compute capability 8.0 or 9.0 (default); "
    "else they run in Triton's interpreter",
}


def _read() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ptx", **OPTION)
    given = parser.parse_known_args(sys.argv[1:])[0].ptx
    if given:
        os.environ[VARIABLE] = given


_read()


def add(parser: pytest.Parser) -> None:
    """Declare the option to pytest."""
    parser.addoption("--ptx", **OPTION)


def wanted() -> bool:
    """Return whether the emulator is to run the kernels."""
    return VARIABLE in os.environ


def why_not() -> str | None:
    """Return why the emulator cannot run kernels here; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return build.why_not()


def arch() -> int:
    """Return the compute capability for which Triton compiles."""
    return int(os.environ[VARIABLE])


def start(config: pytest.Config) -> None:
    """Let one emulated GPU run every launch of this process from now on.

    Raises:
        pytest.UsageError: there is a GPU, whose memory the emulator cannot access.
    """
    if torch.cuda.is_available():
        raise pytest.UsageError("--ptx is for machines without a GPU")
    if why_not() is None:
        from tests.ptx import hooks, machine

        machine.take_over(arch(), PROGRAMS)
        config.pluginmanager.register(hooks)


@contextmanager
def programs_at_once(n: int) -> Iterator[None]:
    """Let the one launch have ``n`` programs."""
    from tests.ptx import machine

    with machine.programs_at_once(n):
        yield

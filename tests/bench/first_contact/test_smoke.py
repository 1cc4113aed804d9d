"""The smoke test passes only if every check has compared something and found nothing wrong."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from bench.first_contact import smoke
from bench.first_contact.smoke import main
from gradkern.check import selfcheck
from gradkern.check.selfcheck import Outcome

F32, F64 = torch.float32, torch.float64


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, torch.dtype], Outcome]:
    """The outcomes of two checks, which a test may change, in place of those of all checks."""
    outcomes: dict[tuple[str, torch.dtype], Outcome] = {}

    def each(function: Callable[..., Any], arguments: Sequence[Any]) -> Iterator[Any]:
        nothing = Outcome({}, selfcheck.NOTHING)
        return ((given, outcomes.get(given[:2], nothing)) for given in arguments)

    monkeypatch.setattr(smoke, "each", each)
    monkeypatch.setattr(selfcheck, "checks", lambda kind: dict.fromkeys(["a", "b", "c", "d"]))
    monkeypatch.setattr(sys, "argv", ["smoke", "cpu", "out"])
    outcomes |= {("a", F32): Outcome({F32: 1e-7}, None), ("d", F64): Outcome({F64: 1e-15}, None)}
    return outcomes


def test_all_is_right(found: dict[Any, Outcome], capsys: pytest.CaptureFixture[str]) -> None:
    assert main() == 0
    assert capsys.readouterr().out.endswith("all 2 checks OK\n")


@pytest.mark.parametrize("errors", [{}, {F64: 0.5}])  # without errors, an exception: a kernel does not compile
def test_one_dtype_is_wrong(
    errors: dict[torch.dtype, float], found: dict[Any, Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    found["a", F64] = Outcome(errors, "error 0.5")
    assert main() == 1
    out = capsys.readouterr().out
    assert "a FAILED: torch.float64: error 0.5\n" in out
    assert out.endswith("1 of 2 checks FAILED: a\n")


def test_a_check_that_compares_nothing_has_failed(
    found: dict[Any, Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    del found["a", F32]
    assert main() == 1
    assert f"a FAILED: {selfcheck.NOTHING}\n" in capsys.readouterr().out


def test_a_gpu_that_the_kernels_do_not_serve_has_failed(
    found: dict[Any, Outcome], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smoke, "parse_device", lambda text: torch.device("cuda", 0))
    monkeypatch.setattr(selfcheck, "describe", lambda device: "a card")
    monkeypatch.setattr(smoke, "backend", lambda kind: ("pytorch", "no Triton"))
    assert main() == 1
    assert "the kernels do not serve cuda:0: no Triton" in capsys.readouterr().out

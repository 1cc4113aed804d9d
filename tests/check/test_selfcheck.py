"""Tests of ``gradkern info``: it prints versions and devices, checks every operator, and fails if one is wrong."""

import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import gradkern
import gradkern as gk
from gradkern import cli
from gradkern.aggregators.methods import METHODS
from gradkern.check import selfcheck
from gradkern.ops import operators, processor, registry

DEVICES = [str(device) for device in selfcheck.devices()]


@contextmanager
def broken(op: registry.Operator[..., Any], wrong: Callable[..., Any]) -> Iterator[None]:
    """Let ``op`` compute something else on every device within the block."""
    library = torch.library.Library("gradkern", "IMPL")
    before = dict(op.implementations)
    try:
        for device_type in ("cpu", "cuda"):
            op.implementations[device_type] = wrong
            library.impl(op.overload, op.on_flat(wrong), device_type.upper(), allow_override=True)
        yield
    finally:
        library._destroy()
        op.implementations.clear()
        op.implementations.update(before)


def test_info_tells_versions_devices_and_back_ends(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"gradkern  {gradkern.__version__}\n" in printed
    for version in (platform.python_version(), torch.__version__, "triton", "numpy"):
        assert version in printed
    for device in selfcheck.devices():
        assert all(words in printed for words in (str(device), *gradkern.ops.backend(device.type)))
    for words in (processor.name(), processor.blas(), processor.dispatch(), f"threads   {torch.get_num_threads()}"):
        assert words in printed
    (bits,) = [line for line in printed.splitlines() if line.split()[:2] == ["bits", "cpu"]]
    assert bits.endswith(": the same")
    assert "FAILED" not in printed
    for operator in (*registry.operators, *selfcheck.METHODS):
        lines = [line for line in printed.splitlines() if line.split()[:1] == [operator]]
        serving = [str(d) for d in selfcheck.devices() if operator in selfcheck.checks(d.type)]
        assert [line.split()[1] for line in lines] == serving
        assert all(line.endswith("OK") for line in lines)


def test_every_operator_is_checked() -> None:
    registered = torch._C._dispatch_get_all_op_names()
    names = {name.removeprefix("gradkern::") for name in registered if "gradkern::" in name}
    assert set(registry.operators) == names
    assert all(op.cases is not None for op in registry.operators.values())
    # One launch does the whole surgery on some GPUs only.
    assert {*selfcheck.checks("cpu"), "surgery"} - set(selfcheck.METHODS) == names


def slightly_off(J: Tensor, offsets: Tensor | None = None) -> Tensor:
    M = J.double() @ J.double().T
    blocks = 1 if offsets is None else len(offsets) - 1
    M = (M * (1 + 1e-5)).to(torch.float64 if J.dtype == torch.float64 else torch.float32)
    return M if offsets is None else M.expand(blocks, *M.shape).clone()


def writes_nothing(*arguments: object) -> None:
    return None


def projects_nothing(M: Tensor, keys: Tensor | None, partner: str) -> Tensor:
    return torch.eye(M.shape[-1], dtype=M.dtype, device=M.device).expand_as(M).clone()


def does_not_launch(*arguments: object) -> Tensor:
    raise RuntimeError("no kernel image is available")


def test_broken_operators_fail_their_checks_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    """Break all operators in one run, because a run takes seconds."""
    with (
        broken(operators.gramian, slightly_off),
        broken(operators.combine_tensors, writes_nothing),
        broken(operators.combine_out, writes_nothing),
        broken(operators.pcgrad_matrix_out, writes_nothing),
        broken(operators.pcgrad, projects_nothing),
        broken(operators.project, does_not_launch),
    ):
        assert cli.main(["info"]) == 1
    lines = capsys.readouterr().out.splitlines()
    everything = [line for line in lines if "FAILED:" in line]
    failed = [line for line in everything if line.split()[0] not in selfcheck.METHODS]  # methods fail with an operator
    why = {
        "gramian": "allowed",
        "combine.tensors": "nan",
        "combine.out": "nan",
        "pcgrad.matrix_out": "nan",
        "pcgrad": "allowed",
        "project": "RuntimeError: no kernel image is available",
    }
    assert sorted(line.split()[0] for line in failed) == sorted([*why] * len(DEVICES))
    assert all(why[line.split()[0]] in line for line in failed)
    n = sum(len(selfcheck.checks(device.type)) for device in selfcheck.devices())
    assert lines[-1] == f"{len(everything)} of {n} checks FAILED"


def test_every_method_is_checked() -> None:
    assert {f"method:{name}" for name in METHODS} == set(selfcheck.METHODS)


def test_a_broken_method_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = gk.Sum.weights_like
    monkeypatch.setattr(gk.Sum, "weights_like", lambda *arguments: weights(*arguments) * (1 + 1e-4))
    assert "allowed" in selfcheck.check("method:sum", torch.device("cpu")).verdict
    assert selfcheck.check("method:mean", torch.device("cpu")).verdict == "OK"


def depends_on_addresses(J: Tensor, offsets: Tensor | None = None) -> Tensor:
    M = J.double() @ J.double().T * (1.0 if J.data_ptr() % 64 == 0 else 1 + 1e-7)
    M = M.to(torch.float64 if J.dtype == torch.float64 else torch.float32)
    return M if offsets is None else M.expand(len(offsets) - 1, *M.shape).clone()


def test_bits_that_depend_on_addresses_are_found() -> None:
    with broken(operators.gramian, depends_on_addresses):
        found = selfcheck.other_bits()
    assert found is not None
    assert "further on" in found
    assert selfcheck.other_bits() is None


def test_bits_that_differ_fail_the_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(selfcheck, "checks", lambda device_type: {})
    monkeypatch.setattr(selfcheck, "differences", lambda: iter(["float32: other bits"]))
    assert cli.main(["info"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].endswith(": DIFFERENT, float32: other bits")
    assert lines[-1] == "all 0 checks OK, but bits differ"


def test_a_check_of_bits_that_raises_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Iterator[str]:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(selfcheck, "differences", fails)
    assert selfcheck.other_bits() == "RuntimeError: no kernel image is available"


@pytest.mark.parametrize(
    ("built", "named"),
    [
        ("  - Intel(R) oneAPI Math Kernel Library Version 2024.2-Product Build 20240605", "MKL 2024.2"),
        ("  - Build settings: BLAS_INFO=open, BUILD_TYPE=Release", "open"),
        ("  - C++ Version: 202002", "not reported by PyTorch"),
    ],
)
def test_the_blas_is_named_as_pytorch_does(built: str, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.__config__, "show", lambda: f"PyTorch built with:\n{built}\n")
    assert processor.blas() == named


def test_another_blas_tells_nothing_of_its_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert processor.dispatch() == "not reported by this BLAS"


def test_results_of_the_wrong_shape_or_not_a_number_are_errors() -> None:
    one = torch.ones(2)
    assert selfcheck._error(one, one.double(), one) == 0
    assert selfcheck._error(one * torch.nan, one.double(), one) != 0
    with pytest.raises(ValueError, match=r"shape \(2,\) in place of \(1,\)"):
        selfcheck._error(one, one[:1], one[:1])


def test_info_works_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert selfcheck.versions()["triton"].startswith("none: ")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"gradkern {gradkern.__version__}\n"

"""The registry of operators: schemas from signatures, and back ends from folders."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gradkern
from gradkern.ops import operators
from gradkern.ops.arguments import Mask, ProjectionArguments, TaskGrads
from gradkern.ops.registry import operators as by_name

TOY = '''
"""A back end that serves CPU tensors, and says so by its results."""

import torch

from gradkern.ops import operators
from gradkern.ops.registry import Backend

BACKEND = Backend("toy", "cpu", "it is a toy")


@BACKEND.implements(operators.gramian)
def gramian(J, offsets=None):
    return torch.eye(len(J)).to(J) * 7


@BACKEND.implements(operators.gramian_tensors)
def gramian_tensors(rows, mask=None):
    return torch.eye(rows.n_tasks).expand(rows.n_segments, -1, -1) * 7
'''

USE = """
import torch
import gradkern as gk

J = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
p = torch.nn.Parameter(torch.ones(2))
info = gk.backward([(p * J[0]).sum(), (p * J[1]).sum()], [p], aggregator=gk.PCGrad())
print(*gk.ops.backend("cpu"))
print(gk.gramian(J).tolist(), info.gramian.tolist(), p.grad.tolist(), gk.combine(J, torch.ones(2)).tolist())
"""


def test_a_back_end_is_a_folder_and_nothing_else(tmp_path: Path) -> None:
    """It serves the operators that it has; PyTorch's back end serves the others."""
    package = Path(gradkern.__file__).parent
    shutil.copytree(package, tmp_path / "gradkern", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "gradkern/ops/toy").mkdir()
    (tmp_path / "gradkern/ops/toy/__init__.py").write_text(TOY)
    printed = subprocess.run([sys.executable, "-c", USE], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert printed.stdout.splitlines() == [
        "toy it is a toy",
        "[[7.0, 0.0], [0.0, 7.0]] [[7.0, 0.0], [0.0, 7.0]] [4.0, 1.0] [4.0, 1.0]",
    ]


def test_a_schema_follows_from_the_signature() -> None:
    """Groups become their fields; an optional group has optional fields; what an operator writes to is marked."""
    assert str(operators.combine_tensors.overload._schema) == (
        "gradkern::combine.tensors(Tensor?[] grads, int[] segments, int n_segments, Tensor w, Tensor(a!)[] out, "
        "int[]? units=None, int? block=None, Tensor? state=None, Tensor(b!)? kept=None) -> ()"
    )
    assert str(operators.surgery.overload._schema).endswith(
        "bool products_masked=False, Tensor(c!)? kept=None) -> (Tensor, Tensor)"
    )


@pytest.mark.parametrize("name", by_name)
def test_every_operator_has_a_contract(name: str) -> None:
    assert by_name[name].__doc__


def test_the_dispatcher_gives_an_implementation_its_groups_back(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []

    def noted(rows: TaskGrads, mask: Mask | None = None) -> Tensor:
        given.extend((rows, mask))
        return torch.zeros(1, 2, 2)

    call = operators.gramian_tensors.on_flat(noted)
    rows, mask = TaskGrads([torch.ones(3), None], [0], 1), Mask([0], 4, torch.zeros(3, dtype=torch.int64))
    for arguments in ((rows, mask), (rows, None)):
        call(*operators.gramian_tensors.flattened(*arguments))
    call(*rows)  # the dispatcher leaves out what equals a default at the end
    assert [type(x) for x in given] == [TaskGrads, Mask, TaskGrads, type(None), TaskGrads, type(None)]
    assert given[0] == rows
    assert given[1] == mask


def test_a_device_that_no_back_end_serves_is_named() -> None:
    """One launch does the whole surgery on GPUs alone."""
    rows, out = TaskGrads([torch.ones(3), torch.ones(3)], [0], 1), [torch.empty(3)]
    method = ProjectionArguments(torch.rand(1, 2, 2), "all", None, None, 0.0, False)
    with pytest.raises(NotImplementedError, match="gradkern::surgery has no implementation for devices of type cpu"):
        operators.surgery(rows, method, out, None, False, None)

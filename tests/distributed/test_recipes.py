"""The recipes under torchrun: two ranks train the model of one process with the whole batches."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.launched import ROOT

SECONDS = 150
"""After which a launch counts as hanging: imports take ten."""
TOLERANCE = 1e-10
"""Of parameters of about one, in float64: Adam amplifies the roundings of its first steps."""


LAUNCH = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
LAUNCH += ["--rdzv-endpoint", "localhost:0"]  # at a free port


def started(*arguments: str) -> subprocess.Popen[str]:
    """Start Python with some arguments."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ended(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Return what processes print once they have ended without an error; in time, or they are ended."""
    try:
        printed = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, printed, strict=True):
        assert process.returncode == 0, text
    return printed


LIBRARIES = dict.fromkeys(("plain", "ddp", "fsdp"), "torch")
LIBRARIES |= {"accelerate": "accelerate", "lightning": "lightning", "trainer": "transformers"}
"""The recipes, and what each needs."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder where the models are that two ranks have trained, and one process beside them.

    All recipes that can run take one launch, most of which are imports.
    """
    folder = tmp_path_factory.mktemp("trained")
    names = [name for name, library in LIBRARIES.items() if importlib.util.find_spec(library)]
    module = ["-m", "tests.distributed.launched", str(folder), *names]
    ended([started(*LAUNCH, *module), started(*module)])
    return folder


@pytest.mark.parametrize("name", LIBRARIES)
def test_two_ranks_train_the_model_of_one_process(name: str, trained: Path) -> None:
    pytest.importorskip(LIBRARIES[name])
    files = [torch.load(trained / f"{name}, {file}.pt") for file in ("0 of 2", "1 of 2", "0 of 1")]
    assert len(files[0]) > 4
    for p, q, r in zip(*files, strict=True):
        assert p.dtype == torch.float64
        assert torch.equal(p, q)
        torch.testing.assert_close(p, r, rtol=0, atol=TOLERANCE)


def test_the_script_of_several_ranks() -> None:
    """The line that it prints is that of one rank."""
    (printed,) = ended([started(*LAUNCH, "recipes/several_ranks.py")])
    assert printed.splitlines()[-1].endswith("after 80 steps of 2 rank(s)")
    assert printed.count("losses") == 1

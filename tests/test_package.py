"""The package as a user meets it: what an import costs, what it needs, and what it leaves alone."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import gradkern


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_quick_beyond_torch() -> None:
    """The library allows itself 1.5 s. It takes some hundredths, with Triton some tenths: load does not matter."""
    seconds = run("import time, torch; a = time.perf_counter(); import gradkern; print(time.perf_counter() - a)")
    assert float(seconds) < 1.5


def test_import_brings_no_demo_package_along() -> None:
    unwanted = ("sklearn", "matplotlib", "rich", "gradkern.demo", "gradkern.cli", "torch._dynamo")
    assert run(f"import sys, gradkern; print([m for m in {unwanted} if m in sys.modules])") == "[]"


def test_works_with_triton_absent() -> None:
    """On macOS and Windows there is none; here an import of it fails."""
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Absent())
import torch
torch.version.cuda = "13.0"  # so that a CPU build looks for Triton too
import gradkern as gk
J = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
print(gk.PCGrad()(J).tolist(), *gk.ops.backend("cuda"), "triton" in sys.modules)
"""
    why = "Triton cannot be imported (No module named 'triton'); every step then waits on the device"
    assert run(code) == f"[0.5, 1.5] pytorch {why} False"


def test_version_is_the_packages() -> None:
    assert importlib.metadata.version("gradkern") == gradkern.__version__


@pytest.mark.parametrize("name", gradkern.__all__)
def test_public_names_exist_and_are_documented(name: str) -> None:
    assert getattr(gradkern, name).__doc__


def test_kernels_are_a_part_of_gradkern_and_no_top_level_package() -> None:
    """PyPI's ``kernels`` is another project's; what is installed there must not be shadowed."""
    files = {str(f) for f in importlib.metadata.files("gradkern") or []}
    assert not any(f.startswith("kernels/") for f in files)
    here = Path(gradkern.__file__).parent / "kernels"
    assert (here / "gramian.py").exists()
    assert not (here / "__init__.py").exists()


def test_kernels_never_import_gradkern() -> None:
    for source in (Path(gradkern.__file__).parent / "kernels").glob("*.py"):
        text = source.read_text()
        imports = [line for line in text.splitlines() if line.startswith(("import gradkern", "from gradkern"))]
        assert all("gradkern.kernels" in line for line in imports), (source, imports)


def test_the_reference_imports_nothing_of_ours() -> None:
    assert "gradkern" not in (Path(gradkern.__file__).parent / "reference.py").read_text()

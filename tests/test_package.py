"""Tests of the package as a user meets it: the cost of an import, its needs, and its side effects."""

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import gradkern
from gradkern.kernels import settings

ROOT = Path(__file__).parents[1]
KERNELS = Path(settings.__file__).parent
in_a_checkout = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the whole checkout")


def run(code: str) -> str:
    """Run ``code`` in a fresh interpreter and return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_import_loads_no_module_but_those_it_needs() -> None:
    """Allow PyTorch, NumPy, Triton on a build for GPUs, and no module of ours that only some programs use.

    The test looks at modules, not at seconds, which depend on the machine. Compilers (torch._dynamo, sympy) and the
    packages of the demo take seconds each.
    """
    code = """
import sys, torch
torch.version.cuda = "13.0"  # so that a CPU build looks for Triton too
before = set(sys.modules)
import gradkern
print(*(set(sys.modules) - before))
"""
    loaded = [name for name in run(code).split() if not name.startswith("_sysconfigdata")]
    packages = {name.partition(".")[0] for name in loaded}
    assert packages - sys.stdlib_module_names - {"numpy", "triton"} == {"gradkern"}
    of_some_programs = ("check", "cli", "compat", "demo", "plots", "reference", "sampling")
    assert not [name for name in loaded if name.startswith("gradkern.") and name.split(".")[1] in of_some_programs]


def test_works_with_triton_absent() -> None:
    """Make the import of Triton fail, as on macOS and Windows, where it does not exist."""
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
    try:
        version = importlib.metadata.version("gradkern")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gradkern is not installed")
    assert version == gradkern.__version__


@pytest.mark.parametrize("name", gradkern.__all__)
def test_public_names_exist_and_are_documented(name: str) -> None:
    assert getattr(gradkern, name).__doc__


def test_another_projects_kernels_keep_their_name(tmp_path: Path) -> None:
    """Import PyPI's ``kernels``, another project. It is found even if our folder of that name comes first."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("theirs = True")
    first = [str(KERNELS.parent), str(tmp_path)]
    assert run(f"import sys; sys.path[:0] = {first!r}; import kernels; print(kernels.theirs)") == "True"


def test_kernels_never_import_gradkern() -> None:
    for source in KERNELS.glob("*.py"):
        text = source.read_text()
        imports = [line for line in text.splitlines() if line.strip().startswith(("import ", "from "))]
        assert imports, source
        assert not any("gradkern" in line for line in imports), (source, imports)


def test_the_reference_imports_nothing_of_ours() -> None:
    for source in (Path(gradkern.__file__).parent / "reference").glob("*.py"):
        imports = [line for line in source.read_text().splitlines() if line.startswith(("import ", "from "))]
        ours = [line for line in imports if "gradkern" in line]
        assert all(line.startswith("from gradkern.reference.") for line in ours), (source, ours)


# Checkouts without symlinks (Windows, zip downloads)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Copy the files that are installed, with a text file in place of the symlink ``gradkern/kernels``."""
    copy = tmp_path / "checkout"
    not_to_copy = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "gradkern", copy / "gradkern", symlinks=True, ignore=not_to_copy)
    shutil.copytree(ROOT / "kernels", copy / "kernels", ignore=not_to_copy)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    (copy / "gradkern" / "kernels").unlink(missing_ok=True)
    (copy / "gradkern" / "kernels").write_text("../kernels")
    return copy


def built(checkout: Path, kind: str) -> Path:
    """Return a folder with the files that pip would install, from a wheel built as pip builds it."""
    version = importlib.metadata.version("setuptools") if importlib.util.find_spec("setuptools") else "0"
    if int(version.partition(".")[0]) < 77:
        pytest.skip("wheels are built by setuptools 77 and later")
    folder = checkout.parent / kind
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=checkout, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    wheel.unlink()
    return folder


@in_a_checkout
@pytest.mark.parametrize("linked", [False, True])
def test_the_wheel_has_every_module(linked: bool, checkout: Path) -> None:
    """Compare the wheel with the tree: it holds the modules of every folder, kernels included, and nothing else."""
    if linked:
        (checkout / "gradkern" / "kernels").unlink()
        try:
            (checkout / "gradkern" / "kernels").symlink_to("../kernels")
        except OSError as error:
            pytest.skip(f"no symlinks here: {error}")
    folder = built(checkout, "wheel")
    ours = {path.relative_to(ROOT) for path in (ROOT / "gradkern").rglob("*.py") if path.parent.name != "kernels"}
    kernels = {Path("gradkern/kernels", path.name) for path in (ROOT / "kernels").glob("*.py")}
    found = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and "dist-info" not in str(path)}
    assert found == ours | kernels | {Path("gradkern/py.typed")}


@in_a_checkout
@pytest.mark.parametrize("installed", ["on the path", "wheel", "editable"])
def test_imports_with_a_text_file_in_place_of_the_link(installed: str, checkout: Path) -> None:
    folder = checkout if installed == "on the path" else built(checkout, installed)
    others = [path for path in sys.path if path and Path(path) != ROOT]
    names = ["gradkern", "gradkern.kernels.settings"]
    if importlib.util.find_spec("triton"):
        names.append("gradkern.kernels.gramian")
    code = f"""
import importlib, site, sys
site.addsitedir({str(folder)!r})
sys.path += {others!r}
print(*(importlib.import_module(name).__file__ for name in {names!r}), sep="\\n")
"""
    # -S keeps installed packages from coming first.
    done = subprocess.run([sys.executable, "-IS", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    root = folder if installed == "wheel" else checkout
    assert all(Path(file).is_relative_to(root) for file in done.stdout.splitlines()), done.stdout

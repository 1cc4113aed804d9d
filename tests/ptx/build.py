"""The core, compiled by the machine's C++ compiler when it is first needed.

The library is kept in the user's cache, under a name that is a hash of the sources, the flags and the compiler.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

CORE = Path(__file__).parent / "core"
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-ffp-contract=off")
"""-ffp-contract=off: a product and a sum are rounded once each, where the code of the kernel says so."""


@cache
def compiler() -> str | None:
    """Return the C++ compiler, None if there is none."""
    return next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)


def why_not() -> str | None:
    """Return why the core cannot be compiled here; None if it can."""
    return None if compiler() else "there is no C++ compiler"


@cache
def library() -> Path:
    """Return the compiled core.

    Raises:
        RuntimeError: there is no compiler, or it fails.
    """
    command = compiler()
    if command is None:
        raise RuntimeError("there is no C++ compiler")
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
    sources = sorted(CORE.glob("*.cpp"))
    parts = [version, *FLAGS, *(path.read_text() for path in sorted(CORE.iterdir()))]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradkern-tests"
    path = folder / f"ptx-core-{key}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            made = Path(unfinished) / "core.so"
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(partial(_compile, command, Path(unfinished)), sources))
            _run([command, "-shared", "-o", made, *objects])
            os.replace(made, path)
    return path


def _compile(command: str, folder: Path, source: Path) -> Path:
    made = folder / f"{source.stem}.o"
    _run([command, *FLAGS, "-c", "-o", made, source])
    return made


def _run(command: list[str | Path]) -> None:
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{command[0]} fails:\n{run.stderr}")

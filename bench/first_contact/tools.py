"""NVIDIA's tools, wherever they are."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from glob import glob
from pathlib import Path

from bench.first_contact.child import SKIP
from bench.first_contact.plan import DRY

PLACES = (
    "/usr/local/cuda*/bin",
    "/usr/local/cuda*/compute-sanitizer",
    "/opt/cuda/bin",
    "/opt/nvidia/nsight-compute/*",
    "/usr/lib/nvidia-cuda-toolkit/compute-sanitizer",
)


def found(name: str) -> str | None:
    """Return the path of a tool: on PATH, under CUDA_HOME, or in the usual places; of several versions the newest."""
    home = os.environ.get("CUDA_HOME", os.environ.get("CUDA_PATH"))
    places = [f"{home}/bin", f"{home}/compute-sanitizer"] if home else []
    for pattern in PLACES:
        places += sorted(glob(pattern), reverse=True)
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


def run(module: str, name: str, use: Callable[[str, list[str], Path], int]) -> int:
    """Run a program of this package alone, which compiles its kernels, then under a tool; return the exit status.

    Args:
        module: the program. It gets the device, the first argument of this process.
        name: the tool's name.
        use: runs the program under the tool at a path, adds what it says to a file, and returns the exit status.
    """
    device, path = sys.argv[1], Path(sys.argv[2]) / "tools.txt"
    program = [sys.executable, "-m", f"bench.first_contact.{module}", device]
    alone = subprocess.run(program).returncode
    if alone:
        return alone
    if device == DRY:
        print(f"the program passes; a dry run does not call {name}")
        return SKIP
    tool = found(name)
    if tool is None:
        print(f"{name} is neither on PATH nor in CUDA's usual places")
        return SKIP
    return use(tool, program, path)

"""Descriptions of the processor, of its BLAS, and of the code path that the BLAS chooses on it."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch


def described() -> str:
    """Return the processor's model, its architecture, and the widest vectors that PyTorch uses on it."""
    return f"{name()}, {platform.machine()}, PyTorch uses {torch.backends.cpu.get_cpu_capability()}"


def name() -> str:
    """Return the processor's model, from a file on Linux and from Python elsewhere."""
    try:
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # another system, or a sandbox that hides the file
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def blas() -> str:
    """Return the BLAS that PyTorch was built with."""
    built = torch.__config__.show()
    mkl = re.search(r"Math Kernel Library Version (\S+)-Product", built)
    named = re.search(r"BLAS_INFO=(\w+)", built)
    if mkl:
        return f"MKL {mkl[1]}"
    return named[1] if named else "not reported by PyTorch"


def dispatch() -> str:
    """Return the code path that MKL has chosen, in MKL's words. It and the sums depend on the processor's maker."""
    if not torch.backends.mkl.is_available():
        return "not reported by this BLAS"
    # MKL prints it once in a process, to the standard output of C.
    command = [sys.executable, "-c", "import torch; torch.ones(64, 64) @ torch.ones(64, 64)"]
    printed = subprocess.run(
        command, env=os.environ | {"MKL_VERBOSE": "1"}, capture_output=True, text=True, check=False
    ).stdout
    found = re.search(r"MKL_VERBOSE .* architecture (.+?), \w+ [\d.]+GHz", printed)
    return found[1] if found else "not reported by MKL"


def threads() -> str:
    """Return the numbers of threads that PyTorch and MKL use."""
    mkl = re.search(r"mkl_get_max_threads\(\) : (\d+)", torch.__config__.parallel_info())
    return f"{torch.get_num_threads()} in PyTorch" + (f", {mkl[1]} in MKL" if mkl else "")

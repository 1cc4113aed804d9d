"""NVIDIA's tools, wherever they are."""

import os
import shutil
from glob import glob

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


def missing(name: str) -> str:
    """Return the reason to skip a step without its tool."""
    return f"{name} is neither on PATH nor in CUDA's usual places"

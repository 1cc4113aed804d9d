"""``python -m bench.first_contact.machine DEVICE FILE``: the card, its driver, and the versions, as JSON."""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bench.device import parse_device
from bench.first_contact.tools import found
from bench.peers import Peers
from bench.results import new_results, write_json

ASKED = ("name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.memory", "power.limit")


def machine(device: torch.device) -> dict[str, Any]:
    """Return what describes the machine."""
    results = new_results(device, Peers(), {})
    card: dict[str, Any] = {"CUDA": torch.version.cuda, "HIP": torch.version.hip, "nvidia-smi": nvidia_smi()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        card |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "bytes": properties.total_memory,
            "cards": torch.cuda.device_count(),
        }
    return results["machine"] | {"versions": results["versions"], "date": results["date"], "card": card}


def nvidia_smi() -> dict[str, str] | str:
    """Return what nvidia-smi says of the first card, or why it says nothing."""
    tool = found("nvidia-smi")
    if tool is None:
        return "nvidia-smi is not here"
    command = [tool, f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader,nounits", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode or len(values) != len(ASKED):
        return f"nvidia-smi ended with {done.returncode}: {(done.stderr or done.stdout).strip()[:300]}"
    return dict(zip(ASKED, values, strict=True))


if __name__ == "__main__":
    try:
        write_json(Path(sys.argv[2]), machine(parse_device(sys.argv[1])))
    except argparse.ArgumentTypeError as error:  # there is no such device
        sys.exit(str(error))

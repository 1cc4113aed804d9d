"""Raw results: what they say of machine and software, and the files that keep them."""

import csv
import datetime
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy
import torch

import gradkern
from bench import device as machine
from bench.peers import Peers
from gradkern.check import processor


def begun(device: torch.device, peers: Peers, options: dict[str, Any]) -> dict[str, Any]:
    """Results with no rows yet: where, when, with what and how is measured."""
    try:
        triton = version("triton")
    except PackageNotFoundError:  # there is none for macOS and Windows
        triton = None
    return {
        "machine": {
            "device": str(device),
            "model": machine.name(device),
            "system": platform.platform(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "BLAS": processor.blas(),
            "BLAS runs its code for": processor.dispatch(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton,
            "numpy": numpy.__version__,
            "gradkern": gradkern.__version__,
        },
        "peers": peers.found,
        "missing": peers.missing,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "options": options,
        "skipped": [],
        "rows": [],
    }


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Everything; ``--show`` reads it."""
    path.write_text(json.dumps(results, indent=1) + "\n")


def write_csv(path: Path, results: dict[str, Any]) -> None:
    """A line for each contestant of each case; the ratio is to ours, of which there is none to itself."""
    lines = []
    for row in results["rows"]:
        for name, figures in row["contestants"].items():
            of_ours = {f"ratio {q}": value for q, value in row["ratios"].get(name, {}).items()}
            lines.append(row["case"] | {"contestant": name} | figures | of_ours)
    with path.open("w", newline="") as file:
        columns = list(dict.fromkeys(column for line in lines for column in line))
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines)

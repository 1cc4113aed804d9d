"""Raw results: their description of machine and software, and the files they are saved in."""

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
from gradkern.ops import processor


def new_results(device: torch.device, peers: Peers, options: dict[str, Any]) -> dict[str, Any]:
    """Return results without rows: machine, versions, date and options of a run."""
    try:
        triton = version("triton")
    except PackageNotFoundError:  # Triton does not exist for macOS and Windows
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
    """Write all results, in the form that ``--show`` reads. The file is whole at any time."""
    whole = path.with_name(f".{path.name}")
    whole.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(whole, path)


def write_csv(path: Path, results: dict[str, Any]) -> None:
    """Write a line for each contestant of each case, with its time relative to ours; ours has no ratio."""
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

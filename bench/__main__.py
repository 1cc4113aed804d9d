"""``python -m bench --out FILE.json``: measure, print, keep the raw results."""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch

import gradkern
from bench.gramian import sweep
from bench.report import COLUMNS, line, summary


def main() -> None:
    """Measure the sweep, or with --show print the summary of results already kept."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=main.__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="how long to measure each shape (default 1)")
    parser.add_argument("--out", type=Path, help="where to write the raw results")
    parser.add_argument("--show", type=Path, help="print the summary of this file instead of measuring")
    arguments = parser.parse_args()
    if arguments.show:
        print(summary(json.loads(arguments.show.read_text())))
        return
    print(COLUMNS)
    rows = []
    for row in sweep(arguments.seconds):
        rows.append(row)
        print(line(row), flush=True)
    results = {"machine": machine(), "rows": rows}
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{summary(results)}")


def machine() -> dict[str, Any]:
    """What was measured on, and with which versions."""
    return {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gradkern": gradkern.__version__,
    }


if __name__ == "__main__":
    main()

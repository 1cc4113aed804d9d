"""``python -m bench distributed``: measure steps on several ranks, print a table, save raw results; or show some."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.distributed.model import Size
from bench.distributed.ranks import measured
from bench.distributed.table import table
from bench.peers import Peers
from bench.results import new_results, write_json


def main(arguments: Sequence[str]) -> None:
    """Measure a step of PCGrad beside DistributedDataParallel's on Gloo, or with --show print the table of results.

    Words are those that a rank sends, in R / (R - 1). All ranks share this machine's processors and memory, so the
    processor's time says more than the clock, and neither speaks of a network.
    """
    parser = argparse.ArgumentParser(prog="python -m bench distributed", description=main.__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="numbers of processes (default 2)")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each kind (default 5)")
    for name, value in Size()._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"of the model or the batch (default {value})")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="results folder (default bench-out)")
    parser.add_argument("--show", type=Path, help="print the table of this JSON file instead of measuring")
    options = parser.parse_args(arguments)
    if options.show:
        print(table(json.loads(options.show.read_text())))
        return
    size = Size(**{name: getattr(options, name) for name in Size._fields})
    results = new_results(torch.device("cpu"), Peers(), {"rounds": options.rounds})
    for R in options.ranks:
        print(f"{R} ranks", flush=True)
        results["rows"].append(measured(R, size, options.rounds))
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "distributed.json", results)
    print(f"\n{table(results)}\n\nWritten to {options.out}: distributed.json")

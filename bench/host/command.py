"""``python -m bench host``: measure the host's time of a step, print tables, save raw results; or show saved ones."""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from bench.host.nets import NETS
from bench.host.run import run
from bench.host.table import table
from bench.peers import installed_peers
from bench.results import new_results, write_json

TENSORS = (16, 40, 199)


def main(arguments: Sequence[str]) -> None:
    """Measure the host's time of a step by stage, or with --show print the tables of saved results."""
    parser = argparse.ArgumentParser(prog="python -m bench host", description=main.__doc__)
    seconds = "approximate time for each line of the first table and for each number of tensors (default 4)"
    parser.add_argument("--seconds", type=float, default=4, help=seconds)
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="results folder (default bench-out)")
    parser.add_argument("--show", type=Path, help="print the tables of this JSON file instead of measuring")
    options = parser.parse_args(arguments)
    if options.show:
        print(table(json.loads(options.show.read_text())))
        return
    torch.manual_seed(0)
    peers = installed_peers()
    results = new_results(torch.device("cpu"), peers, {"seconds": options.seconds})
    run(NETS, TENSORS, peers, options.seconds, results, partial(print, flush=True))
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "host.json", results)
    print(f"\n{table(results)}\n\nWritten to {options.out}: host.json")

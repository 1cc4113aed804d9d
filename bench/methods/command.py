"""``python -m bench methods``: measure every method beside TorchJD's, print tables, save raw results; or show some."""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from bench.methods.run import run
from bench.methods.table import table
from bench.peers import installed_peers
from bench.results import new_results, write_json
from gradkern.aggregators.by_name import one_of
from gradkern.aggregators.methods import METHODS

TASKS = (2, 3, 8, 20, 40, 64)
SHAPE = (8, 1_000_000)


def main(arguments: Sequence[str]) -> None:
    """Measure the weights of every method and a whole aggregation, or with --show print the tables of saved results."""
    parser = argparse.ArgumentParser(prog="python -m bench methods", description=main.__doc__)
    parser.add_argument("--method", nargs="+", type=_method, default=list(METHODS), help="some only (default: all)")
    seconds = "approximate time for each method and number of tasks (default 0.3); an aggregation takes five times that"
    parser.add_argument("--seconds", type=float, default=0.3, help=seconds)
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="results folder (default bench-out)")
    parser.add_argument("--show", type=Path, help="print the tables of this JSON file instead of measuring")
    options = parser.parse_args(arguments)
    if options.show:
        print(table(json.loads(options.show.read_text())))
        return
    results = new_results(torch.device("cpu"), installed_peers(), {"seconds": options.seconds})
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        rows = [METHODS[name] for name in options.method]
        run(rows, TASKS, SHAPE, options.seconds, results, partial(print, flush=True))
    finally:  # what is measured so far is also saved if a method raises
        write_json(options.out / "methods.json", results)
    print(f"\n{table(results)}\n\nWritten to {options.out}: methods.json")


def _method(text: str) -> str:
    try:
        return one_of(METHODS, text, "METHOD")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None

"""``python -m bench.lost``: measure what is lost of the surgery, print tables, save raw results; or show saved ones."""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from bench.lost.problems import Problem, digits, minbert
from bench.lost.run import train
from bench.lost.table import table
from bench.peers import Peers
from bench.results import new_results, write_json
from examples.minbert.files import read


def main(arguments: Sequence[str] | None = None) -> None:
    """Train three-task minBERT and digits by rows, and measure sketches and features on the way, or with --show print.

    The share of the surgery that is lost depends on the problem: on how much its tasks conflict.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.lost", description=main.__doc__)
    parser.add_argument("--data", type=Path, help="folder with ids-sst-*, quora-* and sts-*.csv, for minBERT")
    parser.add_argument("--seeds", type=int, default=4, help="number of trainings of each model (default 4)")
    parser.add_argument("--steps", type=int, default=100, help="steps of each training (default 100)")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="results folder (default bench-out)")
    parser.add_argument("--show", type=Path, help="print the tables of this JSON file instead of measuring")
    options = parser.parse_args(arguments)
    if options.show:
        print(table(json.loads(options.show.read_text())))
        return
    data = None if options.data is None else options.data.name
    settings = {"data": data, "seeds": options.seeds, "steps": options.steps}
    results = new_results(torch.device("cpu"), Peers(), settings)
    problems: dict[str, Callable[[int], Problem]] = {}
    try:
        if options.data is None:
            raise FileNotFoundError("its sentences are not part of the repository: give --data")
        problems["minBERT"] = partial(minbert, read(options.data, "train"))
    except FileNotFoundError as error:
        results["skipped"].append({"problem": "minBERT", "why": str(error)})
    problems["digits"] = digits
    options.out.mkdir(parents=True, exist_ok=True)
    for name, make in problems.items():
        for seed in range(options.seeds):
            print(f"{name}, seed {seed}", flush=True)
            train(name, make(seed), seed, options.steps, results)
    write_json(options.out / "lost.json", results)
    print(f"\n{table(results)}\n\nWritten to {options.out}: lost.json")


if __name__ == "__main__":
    main()

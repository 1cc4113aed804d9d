"""``python -m bench.step``: measure a whole training step, print a table and save raw results; or show saved ones."""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.device import parse_device
from bench.peers import Peers, installed_peers
from bench.results import new_results, write_json
from bench.step.model import SIZES
from bench.step.run import run
from bench.step.shared.models import MODELS
from bench.step.shared.run import run as run_shared
from bench.step.shared.table import table as table_of_shared
from bench.step.table import table

TASKS = (2, 3, 8, 40)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure a training step of an encoder with three tasks, or with --show print the table of saved results.

    With --shared all tasks share one forward pass, of several models, and the step ends with the backward passes.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=main.__doc__)
    parser.add_argument("--size", choices=SIZES, default="minilm", help="size of the encoder (default minilm)")
    parser.add_argument("--shared", action="store_true", help="measure the ways of a step with one forward pass")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS), help="with --shared (default all)")
    tasks = f"numbers of tasks with --shared (default {' '.join(map(str, TASKS))})"
    parser.add_argument("--tasks", nargs="+", type=_several, default=TASKS, help=tasks)
    parser.add_argument("--device", type=parse_device, default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--peers", action="store_true", help="measure other libraries beside ours")
    seconds = "approximate time to measure the step, with --shared each one, in at least three rounds (default 60)"
    parser.add_argument("--seconds", type=float, default=60, help=seconds)
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="results folder (default bench-out)")
    parser.add_argument("--show", type=Path, help="print the table of this JSON file instead of measuring")
    options = parser.parse_args(arguments)
    if options.show:
        print(_table(json.loads(options.show.read_text())))
        return
    torch.manual_seed(0)
    peers = installed_peers() if options.peers else Peers()
    settings = {"peers": options.peers, "seconds": options.seconds}
    of_shared = {"shared": True, "models": options.model, "tasks": list(options.tasks)}
    settings |= of_shared if options.shared else {"size": options.size}
    results = new_results(options.device, peers, settings)
    measured = (options.device, peers, options.seconds, results, partial(print, flush=True))
    options.out.mkdir(parents=True, exist_ok=True)
    name = "shared.json" if options.shared else "step.json"
    try:
        if options.shared:
            run_shared(options.model, options.tasks, *measured)
        else:
            run(SIZES[options.size], *measured)
    finally:  # what is measured so far is also saved if a contestant raises
        write_json(options.out / name, results)
    print(f"\n{_table(results)}\n\nWritten to {options.out}: {name}")


def _several(text: str) -> int:
    if int(text) < 2:
        raise argparse.ArgumentTypeError(f"must be 2 or more, got {text}")
    return int(text)


def _table(results: dict[str, Any]) -> str:
    return (table_of_shared if "shared" in results["options"] else table)(results)


if __name__ == "__main__":
    main()

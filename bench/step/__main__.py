"""``python -m bench.step``: measure a whole training step, print a table and save raw results; or show saved ones."""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from bench.device import parse_device
from bench.peers import Peers, installed_peers
from bench.results import new_results, write_json
from bench.step.model import SIZES
from bench.step.run import run
from bench.step.table import table


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure a training step of an encoder with three tasks, or with --show print the table of saved results."""
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=main.__doc__)
    parser.add_argument("--size", choices=SIZES, default="minilm", help="size of the encoder (default minilm)")
    parser.add_argument("--device", type=parse_device, default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--peers", action="store_true", help="measure other libraries beside ours")
    seconds = "approximate time to measure the step, in at least three rounds (default 60)"
    parser.add_argument("--seconds", type=float, default=60, help=seconds)
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="results folder (default bench-out)")
    parser.add_argument("--show", type=Path, help="print the table of this JSON file instead of measuring")
    options = parser.parse_args(arguments)
    if options.show:
        print(table(json.loads(options.show.read_text())))
        return
    torch.manual_seed(0)
    peers = installed_peers() if options.peers else Peers()
    settings = {"size": options.size, "peers": options.peers, "seconds": options.seconds}
    results = new_results(options.device, peers, settings)
    run(SIZES[options.size], options.device, peers, options.seconds, results, partial(print, flush=True))
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "step.json", results)
    print(f"\n{table(results)}\n\nWritten to {options.out}: step.json")


if __name__ == "__main__":
    main()

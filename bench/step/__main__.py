"""``python -m bench.step``: measure a whole training step, print a table, keep the raw results; or show kept ones."""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from bench.device import chosen
from bench.peers import Peers, installed
from bench.results import begun, write_json
from bench.step.model import SIZES
from bench.step.run import run
from bench.step.table import table


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure a training step of an encoder under three tasks, or with --show print the table of kept results."""
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=main.__doc__)
    parser.add_argument("--size", choices=SIZES, default="minilm", help="of the encoder (default minilm)")
    parser.add_argument("--device", type=chosen, default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--peers", action="store_true", help="measure other libraries beside ours")
    seconds = "about how long to measure the step, in three rounds at least (default 60)"
    parser.add_argument("--seconds", type=float, default=60, help=seconds)
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="folder for results (default bench-out)")
    parser.add_argument("--show", type=Path, help="print the table of this JSON file instead of measuring")
    options = parser.parse_args(arguments)
    if options.show:
        print(table(json.loads(options.show.read_text())))
        return
    torch.manual_seed(0)
    peers = installed() if options.peers else Peers()
    told = {"size": options.size, "peers": options.peers, "seconds": options.seconds}
    results = begun(options.device, peers, told)
    run(SIZES[options.size], options.device, peers, options.seconds, results, partial(print, flush=True))
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "step.json", results)
    print(f"\n{table(results)}\n\nWritten to {options.out}: step.json")


if __name__ == "__main__":
    main()

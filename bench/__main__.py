"""``python -m bench``: measure, print a table, keep the raw results with plots; or show results that were kept."""

import argparse
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import cases
from bench.device import chosen
from bench.peers import Peers, find
from bench.plots import write_plots
from bench.report import summary
from bench.results import begun, write_csv, write_json
from bench.run import run
from bench.table import table


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the sweep, or with --show print the summary of results that were kept."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="few shapes: about a minute on two slow cores")
    parser.add_argument("--peers", action="store_true", help="measure other libraries and torch.compile beside ours")
    parser.add_argument("--device", type=chosen, default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--seconds", type=float, default=0.5, help="about how long to measure a case (default 0.5)")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="folder for results (default bench-out)")
    parser.add_argument("--show", type=Path, help="print the summary of this JSON file instead of measuring")
    options = parser.parse_args(arguments)
    if options.show:
        print(summary(json.loads(options.show.read_text())))
        return
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch._inductor")  # its own business
    torch.manual_seed(0)
    peers = find(options.device) if options.peers else Peers()
    for name, version in peers.found.items():
        print(f"found {name} {version}")
    for name, why in peers.missing.items():
        print(f"not found: {name} ({why})")
    told = {"quick": options.quick, "peers": options.peers, "seconds": options.seconds}
    results = begun(options.device, peers, told)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        sweep = cases.quick() if options.quick else cases.full()
        run(sweep, options.device, peers, options.seconds, results)
    except KeyboardInterrupt:
        print("\ninterrupted: what was measured until now is kept")
    finally:  # nor is it lost where a case raises
        write_json(options.out / "results.json", results)
    print(f"\n{table(results)}\n\n{summary(results)}\n")
    write_csv(options.out / "results.csv", results)
    files = ["results.json", "results.csv", *(path.name for path in write_plots(options.out, results))]
    print(f"Written to {options.out}: {', '.join(files)}")


if __name__ == "__main__":
    main()

"""``python -m bench``: measure, print a table and save raw results and plots; or show saved results.

``python -m bench host``, ``python -m bench methods`` and ``python -m bench distributed`` are commands of their own; see
``bench/host``, ``bench/methods`` and ``bench/distributed``.
"""

import argparse
import importlib.util
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import cases
from bench.device import parse_device
from bench.distributed import command as distributed
from bench.host import command as host
from bench.methods import command as methods
from bench.peers import Peers, find_peers
from bench.report import summary
from bench.results import new_results, write_csv, write_json
from bench.run import run
from bench.table import table


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the sweep, or with --show print the summary of saved results."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for name, command in (("host", host), ("methods", methods), ("distributed", distributed)):
        if arguments[:1] == [name]:
            command.main(arguments[1:])
            return
    other = (
        "python -m bench host: where the host's time of a step goes. python -m bench methods: every method's weights. "
        "python -m bench distributed: steps on several ranks"
    )
    parser = argparse.ArgumentParser(prog="python -m bench", description=main.__doc__, epilog=other)
    parser.add_argument("--quick", action="store_true", help="few shapes: about a minute on two slow cores")
    parser.add_argument("--peers", action="store_true", help="measure other libraries and torch.compile beside ours")
    parser.add_argument("--device", type=parse_device, default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--seconds", type=float, default=0.5, help="approximate time per case (default 0.5)")
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="results folder (default bench-out)")
    parser.add_argument("--show", type=Path, help="print the summary of this JSON file instead of measuring")
    options = parser.parse_args(arguments)
    if options.show:
        print(summary(json.loads(options.show.read_text())))
        return
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch._inductor")  # torch's internals
    torch.manual_seed(0)
    peers = find_peers(options.device) if options.peers else Peers()
    for name, version in peers.found.items():
        print(f"found {name} {version}")
    for name, why in peers.missing.items():
        print(f"not found: {name} ({why})")
    settings = {"quick": options.quick, "peers": options.peers, "seconds": options.seconds}
    results = new_results(options.device, peers, settings)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        sweep = cases.quick() if options.quick else cases.full()
        run(sweep, options.device, peers, options.seconds, results)
    except KeyboardInterrupt:
        print("\ninterrupted: the results measured so far are saved")
    finally:  # they are also saved if a case raises
        write_json(options.out / "results.json", results)
    print(f"\n{table(results)}\n\n{summary(results)}\n")
    write_csv(options.out / "results.csv", results)
    print(f"Written to {options.out}: {', '.join(['results.json', 'results.csv', *_plots(options.out, results)])}")


def _plots(folder: Path, results: dict[str, Any]) -> list[str]:
    """Write the plots, if matplotlib is installed; return their files' names."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from bench.plots import write_plots

    return [path.name for path in write_plots(folder, results)]


if __name__ == "__main__":
    main()

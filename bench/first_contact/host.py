"""``python -m bench.first_contact.host DEVICE OUT``: the host's time of a step on a device, and copies of gradients."""

import sys
from functools import partial
from pathlib import Path

import torch

from bench.device import parse_device
from bench.first_contact.clones import counted
from bench.host import stages
from bench.host.command import TENSORS
from bench.host.prepared import Prepared, shapes
from bench.peers import Peers
from bench.results import new_results, write_json

SECONDS = {"cuda": 1.0, "cpu": 0.05}
STEPS = {"cuda": 100, "cpu": 3}


def main() -> int:
    """Measure, and return the exit status, which is 1 if a gradient was copied."""
    device, path = parse_device(sys.argv[1]), Path(sys.argv[2]) / "host.json"
    torch.manual_seed(0)
    results = new_results(device, Peers(), {"seconds": SECONDS[device.type]})
    for n in TENSORS if device.type == "cuda" else TENSORS[:1]:
        with device:  # not during the measurement: every call of torch's would take longer
            prepared = Prepared(shapes(n))
        row = stages.measured(prepared, SECONDS[device.type])
        results["rows"].append(row)
        print(f"{n} tensors: {1e6 * row['seconds'][stages.STEP]['p50']:.0f} µs a step", flush=True)
        write_json(path, results)
    results["clones"] = counted(device, STEPS[device.type], partial(print, flush=True))
    write_json(path, results)
    n_clones = sum(found["clones"] for found in results["clones"])
    last = results["rows"][-1]
    at_most = 1e6 * last["seconds"][stages.STEP]["p50"]
    print(f"{at_most:.0f} µs a step of {last['tensors']} tensors; {n_clones} gradients copied")
    return 1 if n_clones else 0


if __name__ == "__main__":
    sys.exit(main())

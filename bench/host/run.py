"""One run: the small nets, then the stages of a step on both back ends."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.host import nets, stages
from bench.host.nets import Net
from bench.host.prepared import Prepared, shapes
from bench.peers import Peers

PYTORCH, STAND_IN = "PyTorch back end", "stand-in for a GPU"


def run(
    of_nets: Sequence[Net],
    tensors: Sequence[int],
    peers: Peers,
    seconds: float,
    results: dict[str, Any],
    progress: Callable[[str], object],
) -> None:
    """Measure everything.

    Args:
        of_nets: the nets.
        tensors: the numbers of tensors.
        peers: peers to compare with.
        seconds: approximate time for each net, and for each number of tensors on each back end.
        results: results that are extended.
        progress: called with a line that says what comes next.
    """
    for net in of_nets:
        progress(f"{net.T} tasks, {net.layers} layers of {net.width}")
        results["rows"].append(nets.measured(net, peers, seconds))
    results["stages"] = {PYTORCH: []}
    for n in tensors:
        progress(f"{PYTORCH}: {n} tensors")
        results["stages"][PYTORCH].append(stages.measured(Prepared(shapes(n)), seconds))
    progress(f"{STAND_IN}: its kernels are compiled first")
    try:
        results["stages"][STAND_IN] = stand_in(tensors, seconds)
    except RuntimeError as error:
        results["skipped"].append({"what": STAND_IN, "why": str(error)})


def stand_in(tensors: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """Return the rows that ``standin.py`` measures in a process of its own.

    Raises:
        RuntimeError: there is no Triton, or that process fails.
    """
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("Triton is not installed")
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.host.standin", str(seconds), *map(str, tensors)],
        cwd=Path(__file__).parents[2],
        env=compiling,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.splitlines() or [f"its process ended with {done.returncode}"])[-1])
    return json.loads(done.stdout)

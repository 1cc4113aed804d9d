"""Cases measured one after another and saved one after another. A case that fails is noted, and the others go on."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case
from bench.contestants import NAMES, ONE_LAUNCH, OURS, contestants
from bench.device import free_bytes
from bench.first_contact.workers import each
from bench.floors import COPY, memory_bytes
from bench.inputs import Inputs
from bench.measure import context
from bench.peers import Peers
from bench.results import new_results, write_json
from bench.run import SHARE, measure_case
from bench.table import COLUMNS, line

LEFT_OUT = dict.fromkeys(set(NAMES) - {OURS, ONE_LAUNCH, COPY}, "not measured here")
SMALL = 64_000
"""Numbers of a row that compiles what any row compiles."""


def measured(cases: Sequence[Case], device: torch.device, seconds: float, path: Path, key: str = "rows") -> int:
    """Add the cases to the results in a file, and return how many failed.

    Args:
        cases: the cases.
        device: the device.
        seconds: approximate time for each case.
        path: file of results, which other cases may be in.
        key: where in the results the cases' rows are.
    """
    results = json.loads(path.read_text()) if path.exists() else new_results(device, Peers(), {"seconds": seconds})
    if device.type != "cpu":
        _compile(cases, device)
    rows, n_failed = results.setdefault(key, []), 0
    print(COLUMNS)
    for case in cases:
        try:
            rows.append(_row(case, device, seconds))
            print(line(rows[-1]), flush=True)
        except Exception as error:  # the card may lack memory for one case, or a kernel fail in one
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            results["skipped"].append({"case": asdict(case), "why": why})
            print(f"{case}: {why}", flush=True)
            n_failed += 1
        write_json(path, results)
    print(f"cases measured: {len(cases) - n_failed} of {len(cases)}")
    return n_failed


def _row(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    needs, free = memory_bytes(case), SHARE * free_bytes(device)
    if needs > free:
        raise MemoryError(f"needs about {needs / 1e9:.1f} GB, and a case may take {free / 1e9:.1f} GB")
    return measure_case(case, device, Peers(), seconds, LEFT_OUT)


def _compile(cases: Sequence[Case], device: torch.device) -> None:
    """Compile the kernels of all cases, in several processes: one would take longer for it than for measuring."""
    small = dict.fromkeys((replace(case, P=SMALL), device) for case in cases)
    for (case, _), why in each(_failure, list(small)):
        if why is not None:
            print(f"{case}: {why}", flush=True)


def _failure(case: Case, device: torch.device) -> str | None:
    """Call the contestants once, and return why that fails, if it does: the case will show it too."""
    try:
        for name, run in contestants(Inputs(case, device), Peers()).items():
            if name not in LEFT_OUT:
                with context(run):
                    run()
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None

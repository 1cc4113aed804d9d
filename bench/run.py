"""One run: case after case, each with its contestants in turn, with a printed line for each."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from bench import device as machine
from bench.cases import Case
from bench.contestants import OURS, contestants
from bench.floors import COPY, copied_bytes, least_bytes, memory_bytes
from bench.inputs import Inputs
from bench.measure import measure, quantiles, ratio
from bench.peers import Peers
from bench.table import COLUMNS, line

SHARE = 0.4
"""Share of the free memory that a case may take: the estimate is rough, and the machine may be shared."""

LONGEST = 10.0
"""Most seconds that a call of another contestant may be expected to take, judged by its time at a smaller P."""


def measure_case(
    case: Case, device: torch.device, peers: Peers, seconds: float, left_out: dict[str, str]
) -> dict[str, Any]:
    """Measure one case; return each contestant's figures, its time relative to ours, and reasons for absences."""
    runs = contestants(Inputs(case, device), peers)
    found = measure({name: run for name, run in runs.items() if name not in left_out}, OURS, seconds, device)
    least = {name: copied_bytes(case) if name == COPY else least_bytes(case) for name in found.seconds}

    def percent(name: str) -> float:
        """Return the percent of the copy's bandwidth; it may exceed 100, because a copy writes and some only read."""
        return 100 * ratio(found.seconds[COPY], found.seconds[name])["p50"] * least[name] / least[COPY]

    return {
        "case": asdict(case),
        "contestants": {
            name: quantiles(t)
            | {"rounds": len(t), "bytes": least[name], "percent of copy": percent(name), "peak": found.peaks[name]}
            for name, t in found.seconds.items()
        },
        "ratios": {name: ratio(t, found.seconds[OURS]) for name, t in found.seconds.items() if name != OURS},
        "absent": left_out | found.failed,
    }


def too_long(case: Case, rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the contestants whose calls are expected to take too long, with the reason.

    The expected time is proportional to P. It comes from the last row whose case differs in P alone.
    """
    alike = [row for row in rows if Case(**row["case"] | {"P": case.P}) == case]
    expected = {
        name: figures["p50"] * case.P / row["case"]["P"]
        for row in alike[-1:]
        for name, figures in row["contestants"].items()
    }
    return {name: f"about {t:.0f} s a call" for name, t in expected.items() if t > LONGEST and name not in (OURS, COPY)}


def run(
    cases: Sequence[Case],
    device: torch.device,
    peers: Peers,
    seconds: float,
    results: dict[str, Any],
) -> None:
    """Measure all cases that fit, printing a line for each.

    Args:
        cases: cases to measure.
        device: device to measure on.
        peers: peers to compare with.
        seconds: approximate time for each case.
        results: results whose "rows" and "skipped" are extended.
    """
    room = SHARE * machine.free_bytes(device)
    fitting = [case for case in cases if memory_bytes(case) <= room]
    for case in cases:
        if memory_bytes(case) > room:
            why = f"needs about {memory_bytes(case) / 1e9:.1f} GB, and a case may take {room / 1e9:.1f} GB"
            print(f"skipped: {case}: {why}")
            results["skipped"].append({"case": asdict(case), "why": why})
    effort = [_effort(case, seconds) for case in fitting]
    started = time.monotonic()
    print(f"{'':18}{COLUMNS}")
    for k, case in enumerate(fitting):
        # The estimate is corrected by the time of the cases so far. The first ones compile, so one minute is added to
        # both times.
        pace = (time.monotonic() - started + 60) / (sum(effort[:k]) + 60)
        left = pace * sum(effort[k:])
        print(f"{len(fitting) - k:4} left, {_duration(left):>6} ", end="", flush=True)
        row = measure_case(case, device, peers, seconds, too_long(case, results["rows"]))
        print(line(row), flush=True)
        results["rows"].append(row)


def _effort(case: Case, seconds: float) -> float:
    """Estimate the seconds that a case takes: the timed part, plus naive's passes over all pairs of vectors."""
    return 2 * seconds + 5e-9 * case.T * (case.T + 10) * case.P


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"

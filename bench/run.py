"""One run: case after case, each with its contestants in turn, told while it goes on."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from bench import device as machine
from bench.cases import Case
from bench.contestants import OURS, contestants
from bench.floors import COPY, copied_bytes, held_bytes, least_bytes
from bench.inputs import Inputs
from bench.measure import measured, quantiles, ratio
from bench.peers import Peers
from bench.table import COLUMNS, line

SHARE = 0.4
"""Of the free memory, what a case may take: the estimate is rough, and others use the machine."""


LONGEST = 10.0
"""Seconds that a call may take, as one on fewer numbers lets expect, for a contestant other than ours to take part."""


def measure_case(
    case: Case, device: torch.device, peers: Peers, seconds: float, left_out: dict[str, str]
) -> dict[str, Any]:
    """Raw results of one case: what each contestant took, how many times as long as ours, and why others did not."""
    taking_part = contestants(Inputs(case, device), peers)
    found = measured({name: taking_part[name] for name in taking_part if name not in left_out}, OURS, seconds, device)
    least = {name: copied_bytes(case) if name == COPY else least_bytes(case) for name in found.seconds}

    def percent(name: str) -> float:
        """Of the bandwidth of the copy; beyond 100 where what a contestant must move is read, and a copy writes too."""
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
    """The contestants that a call is expected to take too long: in proportion to P, from the last case else alike."""
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
        cases: what to measure.
        device: where.
        peers: beside whom.
        seconds: about how long for each.
        results: with "rows" and "skipped", to which what was measured is added, and what was not.
    """
    room = SHARE * machine.free_bytes(device)
    fitting = [case for case in cases if held_bytes(case) <= room]
    for case in cases:
        if held_bytes(case) > room:
            why = f"about {held_bytes(case) / 1e9:.1f} GB, of {room / 1e9:.1f} GB that a case may take"
            print(f"skipped: {case}: {why}")
            results["skipped"].append({"case": asdict(case), "why": why})
    effort = [_effort(case, seconds) for case in fitting]
    started = time.monotonic()
    print(f"{'':18}{COLUMNS}")
    for k, case in enumerate(fitting):
        # As the cases until now bore the estimate out; the first ones compile, so a minute of it is taken as right.
        pace = (time.monotonic() - started + 60) / (sum(effort[:k]) + 60)
        left = pace * sum(effort[k:])
        print(f"{len(fitting) - k:4} left, {_duration(left):>6} ", end="", flush=True)
        row = measure_case(case, device, peers, seconds, too_long(case, results["rows"]))
        print(line(row), flush=True)
        results["rows"].append(row)


def _effort(case: Case, seconds: float) -> float:
    """About how many seconds a case takes: what is timed, and more where passing over all pairs of vectors is long."""
    return 2 * seconds + 5e-9 * case.T * (case.T + 10) * case.P


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"

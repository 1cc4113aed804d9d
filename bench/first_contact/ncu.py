"""``python -m bench.first_contact.ncu DEVICE OUT``: Nsight Compute's figures of the combination, if ncu is here."""

import csv
import subprocess
import sys
from pathlib import Path

from bench.first_contact.child import SKIP
from bench.first_contact.tools import run

TOOL = "ncu"
METRICS = {
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory, % of peak",
    "gpu__time_duration.sum": "time",
    "launch__registers_per_thread": "registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy, %",
    "launch__occupancy_limit_registers": "programs by registers",
}
REFUSED = "ERR_NVGPUCTRPERM"
"""What ncu says where the driver lets only the administrator read the counters."""


def command(tool: str, program: list[str]) -> list[str]:
    """Return the command that measures every launch of the combination in ``program``."""
    kernels = ("--kernel-name", "regex:combine", "--launch-count", "4")
    return [tool, "--csv", "--target-processes", "all", *kernels, "--metrics", ",".join(METRICS), *program]


def figures(output: str) -> list[str]:
    """Return a line for each launch in ncu's CSV, which has a line for each metric."""
    lines = output.splitlines()
    start = next((k for k, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, list[str]] = {}
    for row in csv.DictReader(lines[start:]):
        named = METRICS.get(row["Metric Name"], row["Metric Name"])
        values = launches.setdefault(f"{row['ID']} {row['Kernel Name']}", [])
        values.append(f"{named}: {row['Metric Value']} {row['Metric Unit']}".rstrip(" %"))
    return [f"{launch}: {', '.join(values)}" for launch, values in launches.items()]


def measured(tool: str, program: list[str], path: Path) -> int:
    """Measure the program, add the figures to a file, and return the exit status."""
    done = subprocess.run(command(tool, program), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = figures(done.stdout)
    with path.open("a") as file:
        file.write(f"== {TOOL}\n" + "".join(f"{line}\n" for line in lines or done.stdout.splitlines()[-20:]))
    if REFUSED in done.stdout:
        print(f"{TOOL} may not read the counters here: {REFUSED}")
        return SKIP
    print(lines[-1] if lines else f"{TOOL} measured no launch, and ended with {done.returncode}")
    return 0 if lines and not done.returncode else 1


if __name__ == "__main__":
    sys.exit(run("combination", TOOL, measured))

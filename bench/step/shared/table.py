"""Markdown tables of raw results, for the terminal and the notes."""

from typing import Any

from bench.peers import TORCHJD
from bench.step.shared.models import MODELS
from bench.step.shared.ways import PLAIN
from bench.table import digits

LEGEND = f"""\
Forward and backward passes of one batch whose tasks share the trunk's pass, and UPGrad of the sum of the losses. A cell
has a figure for each number of tasks in turn; "–": not measured. Processor, clock: how many times as long as {PLAIN},
the backward pass of the sum, by the processor's time and by the clock; the median of the rounds' ratios. 20–80 %: the
percentiles of the former, where there is more than one round. Peak: memory above the model's, with the batch's
activations, in P float32 numbers. Error: how far the trunk's update is from that of rows in float64, relative to that;
for sketches and features, relative to the part of it that is due to surgery, where {PLAIN} is 100 % off. This share
depends on the problem; here the tasks have random targets, which conflict. LibMTL's weights are gradkern's."""
COLUMNS = ("processor", "20–80 %", "clock", "peak, P", "error")


def table(results: dict[str, Any]) -> str:
    """Return a table for each model with a line for each way, the meaning of the columns, and what was left out."""
    machine, rows = results["machine"], results["rows"]
    threads = f", threads: {machine['threads']}" if machine["device"] == "cpu" else ""
    torchjd = f", {TORCHJD} {results['peers'][TORCHJD]}" if TORCHJD in results["peers"] else ""
    blocks = [f"{machine['model']}{threads}, torch {results['versions']['torch']}{torchjd}"]
    for model in dict.fromkeys(row["model"] for row in rows):
        blocks.append(_of_model(MODELS[model].text, [row for row in rows if row["model"] == model]))
    left_out = [f"- Left out: {_where(s)}{s['way']} ({s['why']})" for s in results["skipped"]]
    return "\n\n".join([*blocks, LEGEND, *(["\n".join(left_out)] if left_out else [])])


def _of_model(text: str, rows: list[dict[str, Any]]) -> str:
    tasks = list(dict.fromkeys(row["T"] for row in rows))
    by_way: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        by_way.setdefault(row["way"], {})[row["T"]] = row
    millions = " / ".join(dict.fromkeys(f"{row['P'] / 1e6:.1f}M" for row in rows))
    lines = [f"| {text}, P = {millions}; T = {' / '.join(map(str, tasks))} | {' | '.join(COLUMNS)} |"]
    lines.append("|---|" + "--:|" * len(COLUMNS))
    for way, of_T in by_way.items():
        cells = zip(*(_cells(of_T.get(T)) for T in tasks), strict=True)
        lines.append(f"| {way} | {' | '.join(' / '.join(figures) for figures in cells)} |")
    return "\n".join(lines)


def _cells(row: dict[str, Any] | None) -> tuple[str, ...]:
    """Return a figure for each column."""
    if row is None:
        return ("–",) * len(COLUMNS)
    times = row[f"processor over {PLAIN}"]
    spread = f"{times['p20']:.2f}–{times['p80']:.2f}" if row["rounds"] > 1 else "–"
    error = f"{row['error']:.0e}" if row["exact"] else f"{digits(100 * row['lost'])} %"
    clock = row[f"seconds over {PLAIN}"]["p50"]
    return f"{times['p50']:.2f}", spread, f"{clock:.2f}", f"{row['peak in P']:.2f}", error


def _where(skipped: dict[str, Any]) -> str:
    return f"{skipped['model']}, T = {skipped['T']}: " if "model" in skipped else ""

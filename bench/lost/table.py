"""Markdown tables of raw results, for the terminal and the notes."""

from statistics import fmean
from typing import Any

from bench.measure import quantiles

NOTHING = 1e-4
"""The part of the plain update that surgery must change for a share to count. The share of a smaller change would be
rounding, as updates are float32."""
LEGEND = f"""\
The share of the surgery that is lost, ‖way - rows‖ / ‖plain - rows‖ of the updates of the P shared parameters: the
median over steps and seeds, with the 20th and 80th percentile. 0 is exact, 1 as far off as no surgery. Plain is what
the method makes of gradients that are orthogonal and equally long: their sum for pcgrad, their mean for the others.
What surgery changes: ‖plain - rows‖ / ‖plain‖. "n of N": the steps that count, in which that is more than {NOTHING:g}.
Agreement: the share of pairs of tasks that conflict in the way's Gramian if and only if they do in that of rows, in all
N steps, the mean over the methods."""


def table(results: dict[str, Any]) -> str:
    """Return a table for each problem with a line for each way, the meaning of the cells, and what was left out."""
    machine, versions, rows = results["machine"], results["versions"], results["rows"]
    blocks = [f"{machine['model']}, Python {versions['python']}, torch {versions['torch']}"]
    blocks += [_of_problem(name, [row for row in rows if row["problem"] == name]) for name in _names(rows, "problem")]
    left_out = [f"- Left out: {s['problem']} ({s['why']})" for s in results["skipped"]]
    return "\n\n".join([*blocks, LEGEND, *(["\n".join(left_out)] if left_out else [])])


def _of_problem(name: str, rows: list[dict[str, Any]]) -> str:
    methods = {method: [row for row in rows if row["method"] == method] for method in _names(rows, "method")}
    counted = {method: [row for row in of if row["surgery"] > NOTHING] for method, of in methods.items()}
    heads = [f"{method}, {len(counted[method])} of {len(of)}" for method, of in methods.items()]
    lines = [f"| {name}, P = {rows[0]['P']:,} | {' | '.join(heads)} | agreement |", "|---|" + "--:|" * (len(heads) + 1)]
    changes = [_cell([row["surgery"] for row in of]) for of in counted.values()]
    lines.append(f"| what surgery changes | {' | '.join(changes)} | – |")
    for way in rows[0]["off"]:
        cells = [_cell([row["off"][way] / row["surgery"] for row in of]) for of in counted.values()]
        agreement = fmean(row["agreement"][way] for row in rows)
        lines.append(f"| {way} | {' | '.join(cells)} | {100 * agreement:.1f} % |")
    return "\n".join(lines)


def _names(rows: list[dict[str, Any]], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def _cell(shares: list[float]) -> str:
    if not shares:
        return "–"
    found = quantiles(shares)
    return f"{found['p50']:.3f} ({found['p20']:.3f}–{found['p80']:.3f})"

"""Markdown tables of raw results, for the terminal and the notes."""

from typing import Any

from bench.host.nets import GRADVAC, OURS, PASSES, PER_PARAMETER, UPDATE, USUAL, USUAL_UPDATE
from bench.host.prepared import CUT, SIDE, T
from bench.host.run import STAND_IN
from bench.host.stages import ADAMW, STAGES, STEP
from bench.peers import TORCHJD
from bench.table import digits

NETS_LEGEND = f"""\
Whole steps after a forward pass that all tasks share. Medians; ratios are between two times of one round. "passes": the
tasks' backward passes alone. "beyond": what comes on top of them. "{USUAL}": the gradients flattened, projected in
random order, added up and split into .grad. "{UPDATE}": SurgeryOptimizer.update with gradkern's AdamW."""
STAGES_LEGEND = f"""\
One step of PCGrad on {T} tasks' prepared gradients, without autograd: microseconds (medians) and calls of Python
functions. The tensors are matrices of {SIDE} × {SIDE} and vectors of {SIDE} in turn, or BERT-base's 199 cut to {CUT} in
each dimension. Stages are timed in rounds of their own, which the watching makes some microseconds longer. Surgery is
Gramian and weights, and where all is one call also the combination."""
STAND_IN_LEGEND = """\
The stand-in runs the Triton back end's host code on CPU tensors, with kernels compiled for sm_90 and a driver that
launches nothing. It is no measurement of a GPU."""


def table(results: dict[str, Any]) -> str:
    """Return all tables, with the meaning of their lines, and what was left out."""
    machine, versions = results["machine"], results["versions"]
    torchjd = results["peers"].get(TORCHJD)
    software = f"Python {versions['python']}, torch {versions['torch']}" + (f", TorchJD {torchjd}" if torchjd else "")
    blocks = [f"{machine['model']}, threads: {machine['threads']}, {software}", _nets(results["rows"]), NETS_LEGEND]
    for back_end, rows in results["stages"].items():
        blocks.append(_stages(back_end, rows))
    blocks.append(STAGES_LEGEND)
    if STAND_IN in results["stages"]:
        blocks.append(STAND_IN_LEGEND)
    left_out = [f"- Left out: {s['what']} ({s['why']})" for s in results["skipped"]]
    if TORCHJD in results["missing"]:
        left_out.append(f"- Left out: {TORCHJD} ({results['missing'][TORCHJD]})")
    return "\n\n".join([*blocks, *(["\n".join(left_out)] if left_out else [])])


def _nets(rows: list[dict[str, Any]]) -> str:
    columns = [
        "passes, µs",
        f"{USUAL} / {OURS}",
        f"{TORCHJD} / {OURS}",
        f"{OURS} beyond, µs",
        f"{USUAL} beyond, µs",
        f"{GRADVAC} / {OURS}",
        f"per parameter / {OURS}",
        f"{USUAL_UPDATE} / {UPDATE}",
        f"{UPDATE} beyond, µs",
    ]
    lines = [f"| T | tensors | numbers | {' | '.join(columns)} |", "|--:|--:|--:|" + "--:|" * len(columns)]
    for row in rows:
        of_ours, beyond = row["of PCGrad"], row["beyond the passes"]
        cells = [
            _us(row["seconds"][PASSES]),
            _ratio(of_ours[USUAL]),
            _ratio(of_ours[TORCHJD]) if TORCHJD in of_ours else "–",
            _us(beyond[OURS]),
            _us(beyond[USUAL]),
            _ratio(of_ours[GRADVAC]),
            _ratio(of_ours[PER_PARAMETER]),
            _ratio(row["of update"][USUAL_UPDATE]),
            _us(beyond[UPDATE]),
        ]
        lines.append(f"| {row['T']} | {row['tensors']} | {row['numbers']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _stages(back_end: str, rows: list[dict[str, Any]]) -> str:
    columns = [column for row in rows for column in (f"{row['tensors']} tensors, µs", "calls")]
    lines = [f"| {back_end} | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]
    for part in (*STAGES, STEP, ADAMW):
        cells = [cell for row in rows for cell in (_us(row["seconds"][part]), f"{row['calls'][part]:,}")]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    for part in (STEP, ADAMW):
        cells = [cell for row in rows for cell in ("", digits(row["calls"][part] / row["tensors"]))]
        lines.append(f"| {part}, calls per tensor | {' | '.join(cells)} |")
    for part in (STEP, ADAMW) if back_end == STAND_IN else ():
        cells = [cell for row in rows for cell in ("", str(row["launches"][part]))]
        lines.append(f"| {part}, launches of kernels | {' | '.join(cells)} |")
    return "\n".join(lines)


def _us(seconds: dict[str, float]) -> str:
    return digits(1e6 * seconds["p50"])


def _ratio(ratio: dict[str, float]) -> str:
    return f"{ratio['p50']:.2f}"

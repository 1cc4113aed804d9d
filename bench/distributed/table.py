"""The table of a measurement."""

from typing import Any

from bench.distributed.model import CUT, ONE_PASS, PLAIN, SURGERY, T_PASSES


def table(results: dict[str, Any]) -> str:
    """Return one line for each number of ranks, in Markdown."""
    times = ("DDP", "surgery", "T - 1 passes", "beyond them, of DDP's", "AdamW cut")
    kinds = ("DDP", "surgery", "AdamW cut", "(T + 1) P + 2 P of heads")
    heads = ["ranks, batch of each", *(f"words, {name}" for name in kinds)]
    heads += [f"{clock}, {name}" for clock in ("clock s", "CPU s") for name in times]
    lines = [f"| {' | '.join(heads)} |", f"|{'--:|' * len(heads)}"]
    for row in results["rows"]:
        P = row["shared"] + row["own"]
        words = [f"{row['words'][name] / P:.3f} P" for name in (PLAIN, SURGERY, CUT)]
        law = ((row["T"] + 1) * row["shared"] + 2 * row["own"]) / P
        numbers = [f"{row['ranks']}, {row['batch']} × {row['length']}", *words, f"{law:.3f} P"]
        for taken in (row["wall"], row["processor"]):
            passes = taken[T_PASSES] - taken[ONE_PASS]
            beyond = (taken[SURGERY] - passes) / taken[PLAIN]
            numbers += [f"{x:.2f}" for x in (taken[PLAIN], taken[SURGERY], passes, beyond, taken[CUT])]
        lines.append(f"| {' | '.join(numbers)} |")
    return "\n".join(lines)

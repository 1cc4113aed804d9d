"""The table of a measurement."""

from typing import Any

from bench.distributed.model import CUT, ONE_PASS, PLAIN, SURGERY, T_PASSES


def table(results: dict[str, Any]) -> str:
    """Return one line for each number of ranks, in Markdown."""
    lines = [
        "| ranks | P | words, DDP | words, surgery | words, AdamW cut | (T + 1) P + 2 P of heads | T - 1 passes "
        "| CPU s, DDP | CPU s, surgery | beyond them, of DDP's | CPU s, AdamW cut "
        "| clock s, DDP | clock s, surgery | beyond them, of DDP's | clock s, AdamW cut |",
        f"|{'--:|' * 15}",
    ]
    for row in results["rows"]:
        P = row["shared"] + row["own"]
        words = [f"{row['words'][name] / P:.3f} P" for name in (PLAIN, SURGERY, CUT)]
        law = ((row["T"] + 1) * row["shared"] + 2 * row["own"]) / P
        times = [passes(row["processor"])]
        for kind in ("processor", "wall"):
            taken = row[kind]
            times += [taken[PLAIN], taken[SURGERY], (taken[SURGERY] - passes(taken)) / taken[PLAIN], taken[CUT]]
        numbers = [*words, f"{law:.3f} P", *(f"{x:.2f}" for x in times)]
        lines.append(f"| {' | '.join([str(row['ranks']), f'{P:,}', *numbers])} |")
    return "\n".join(lines)


def passes(taken: dict[str, float]) -> float:
    """Return the time of T - 1 more backward passes."""
    return taken[T_PASSES] - taken[ONE_PASS]

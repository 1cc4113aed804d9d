"""The table of a measurement."""

from typing import Any

from bench.distributed.model import ONE_PASS, PLAIN, SURGERY, T_PASSES


def table(results: dict[str, Any]) -> str:
    """Return one line for each number of ranks, in Markdown."""
    lines = [
        "| ranks | P | words, DDP | words, surgery | (T + 1) P + 2 P of heads | CPU s, DDP | CPU s, surgery "
        "| T - 1 passes | beyond them, of DDP's | clock s, DDP | clock s, surgery |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in results["rows"]:
        P = row["shared"] + row["own"]
        words = [f"{row['words'][name] / P:.3f} P" for name in (PLAIN, SURGERY)]
        law = ((row["T"] + 1) * row["shared"] + 2 * row["own"]) / P
        used = row["processor"]
        passes = used[T_PASSES] - used[ONE_PASS]
        times = [f"{x:.2f}" for x in (used[PLAIN], used[SURGERY], passes, beyond(row))]
        clock = [f"{row['wall'][name]:.2f}" for name in (PLAIN, SURGERY)]
        lines.append(f"| {' | '.join([str(row['ranks']), f'{P:,}', *words, f'{law:.3f} P', *times, *clock])} |")
    return "\n".join(lines)


def beyond(row: dict[str, Any]) -> float:
    """Return the processor's time of a step without the T - 1 more backward passes, relative to DDP's step."""
    used = row["processor"]
    return (used[SURGERY] - (used[T_PASSES] - used[ONE_PASS])) / used[PLAIN]

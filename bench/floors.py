"""The least memory traffic of a case, and an estimate of the memory it takes."""

from bench.cases import NETWORK, Case
from gradkern.aggregators import Entrywise, Scalarization
from gradkern.aggregators.methods import METHODS

ENTRIES = 4096
"""Entries that GradAttention samples of each task gradient by default."""
COPY = "copy"
ITEM = {"float32": 4, "bfloat16": 2}


def least_bytes(case: Case) -> float:
    """Return the bytes that must be read and written if no row stays in cache after the Gramian."""
    item, T = ITEM[case.dtype], case.T
    if case.operation == "gather":  # int64 positions in, float32 out
        return entries(case) * (8 + T * (item + 4))
    if case.operation == "scatter":
        return entries(case) * (8 + 4 + item)
    if case.operation == NETWORK:  # Gramian and entries in, weights out, float32
        return case.S * T * (T + ENTRIES + 1) * 4
    if case.operation == "pcgrad-program":  # Gramian and keys in, coefficients out, float32
        return case.S * T * T * (4 + 4 + 4)
    if case.operation == "gradvac-program":  # the same, and targets in float64 both ways
        return case.S * T * T * (4 + 4 + 4 + 8 + 8)
    if case.operation == "adamw":  # rows in; parameters, and two moments in float32, both ways
        return case.P * (item * (_read_share(case) * T + 2) + 4 * 4)
    return item * case.P * _words(case)


def _words(case: Case) -> float:
    """Return the words moved per column of the gradients."""
    T, share = case.T, _read_share(case)
    gramian = share * T if case.scope == "all" else T
    combine = share * T + 1
    of_matrix = {"gramian": gramian, "combine": combine, "project": T + T}
    if case.operation in METHODS and issubclass(METHODS[case.operation].aggregator, (Scalarization, Entrywise)):
        return combine
    return of_matrix.get(case.operation, gramian + combine)


def _read_share(case: Case) -> float:
    """Return the share of a row that must be read.

    Dropping single entries saves no reads, because memory is read in whole sectors.
    """
    return 1 - case.p if case.block > 1 else 1


def copied_bytes(case: Case) -> float:
    """Return the bytes that a copy of the case's input reads and writes."""
    numbers = case.T * case.P or case.S * case.T * case.T
    return 2 * ITEM[case.dtype] * numbers


def memory_bytes(case: Case) -> float:
    """Estimate the memory of a case: its rows, their copy, and the temporaries of the contestant that needs most."""
    temporaries = {"project": 2, "pcgrad": 3, "surgery": 3, "adamw": 10 / case.T}.get(case.operation, 0.5)
    return (2 + temporaries) * copied_bytes(case) / 2


def entries(case: Case) -> int:
    """Return the number of positions that ``gather`` and ``scatter`` get."""
    return min(ENTRIES, case.P)

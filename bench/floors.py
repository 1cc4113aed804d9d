"""What a case must move through memory at least, and what it holds there."""

from bench.cases import NETWORK, Case
from gradkern.aggregators import Scalarization
from gradkern.aggregators.methods import METHODS

ENTRIES = 4096
"""What GradAttention takes of each task gradient, unless it is told otherwise."""
COPY = "copy"
ITEM = {"float32": 4, "bfloat16": 2}


def least_bytes(case: Case) -> float:
    """Bytes that have to be read and written if nothing stays in cache between a Gramian and what follows it."""
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
        return case.P * (item * (_kept(case) * T + 2) + 4 * 4)
    return item * case.P * _words(case)


def _words(case: Case) -> float:
    """Per number of a task gradient."""
    T, kept = case.T, _kept(case)
    gramian = kept * T if case.scope == "all" else T
    combine = kept * T + 1
    of_matrix = {"gramian": gramian, "combine": combine, "project": T + T}
    if case.operation in METHODS and issubclass(METHODS[case.operation].aggregator, Scalarization):
        return combine
    return of_matrix.get(case.operation, gramian + combine)


def _kept(case: Case) -> float:
    """The share of a row that must be read. Of what is dropped number by number, memory's sectors bring all."""
    return 1 - case.p if case.block > 1 else 1


def copied_bytes(case: Case) -> float:
    """Bytes that a copy of the case's input reads and writes."""
    numbers = case.T * case.P or case.S * case.T * case.T
    return 2 * ITEM[case.dtype] * numbers


def held_bytes(case: Case) -> float:
    """About how much memory a case takes: its rows, what they are copied to, and the greediest contestant's own."""
    own = {"project": 2, "pcgrad": 3, "surgery": 3, "adamw": 10 / case.T}.get(case.operation, 0.5)
    return (2 + own) * copied_bytes(case) / 2


def entries(case: Case) -> int:
    """How many positions ``gather`` and ``scatter`` are given."""
    return min(ENTRIES, case.P)

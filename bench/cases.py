"""The measured cases, and the sweeps over them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from bench.shapes import BERT_BASE, numbers
from gradkern.aggregators.methods import METHODS

TASKS = (2, 3, 4, 8, 16, 40)
SIZES = tuple(10**k for k in range(3, 9))


class Suppressed(NamedTuple):
    """Arguments of ``gradkern.Suppression``."""

    p: float
    block: int
    scope: str


DENSE = Suppressed(0.0, 1, "update")
SUPPRESSED = [
    Suppressed(p, block, scope)
    for p in (0.3, 0.45, 0.6)
    for block, scope in ((1, "update"), (128, "update"), (128, "all"))
]
MAIN = ("gramian", "combine", "project", "pcgrad", "gradvac")
VARIANTS = tuple(name for name in METHODS if name not in MAIN)
PROGRAMS = ("pcgrad-program", "gradvac-program")
NETWORK = "gradattention-network"


@dataclass(frozen=True)
class Case:
    """One operation on one input.

    Attributes:
        operation: a key of ``contestants.OPERATIONS``.
        T: number of tasks.
        P: length of a task gradient; 0 if the operation takes only Gramians.
        dtype: dtype of the gradients.
        S: number of Gramians, if the operation takes only those.
        shapes: "matrix" for T rows of P numbers; "pieces" (vectors) or "BERT-base" for separate tensors left in place.
        groups: the unit that has its own weights, "model" or "parameter".
        p, block, scope: settings of gradient suppression; p = 0 means no suppression.
    """

    operation: str
    T: int
    P: int
    dtype: str = "float32"
    S: int = 1
    shapes: str = "matrix"
    groups: str = "model"
    p: float = DENSE.p
    block: int = DENSE.block
    scope: str = DENSE.scope

    def __str__(self) -> str:
        return f"{self.operation} {self.input}"

    @property
    def input(self) -> str:
        """Describe everything but the operation."""
        parts = [f"T={self.T}"]
        parts += [f"P={self.P:,}", self.dtype] if self.P else [f"S={self.S}"]
        parts += [self.shapes] if self.shapes != "matrix" else []
        parts += ["per parameter"] if self.groups == "parameter" else []
        parts += [f"p={self.p} block={self.block} {self.scope}"] if self.p else []
        return " ".join(parts)


def full() -> list[Case]:
    """Return the full sweep. Cases on the same gradients are adjacent, so the gradients are generated once."""
    P = numbers(BERT_BASE)
    return [
        *_matrices(TASKS, SIZES, "float32"),
        *(Case("pcgrad", T, 4_000_000) for T in TASKS[:4]),
        *_matrices((3, 8), SIZES[:-1], "bfloat16"),  # dot products of 10^8 bfloat16 numbers take a CPU minutes
        *_variants(10_000),
        *_variants(1_000_000),
        *_surgery(3, 10_000, "pieces", []),
        *_surgery(3, 1_000_000, "pieces", SUPPRESSED),
        *_surgery(3, 1_000_000, "pieces", [], "bfloat16"),
        *_surgery(2, P, "BERT-base", []),
        *_surgery(3, P, "BERT-base", [form for form in SUPPRESSED if form.p == 0.45]),
        *_entries(3, P, "BERT-base"),
        Case("adamw", 3, P, shapes="BERT-base"),
        *_surgery(3, P, "BERT-base", [], "bfloat16"),
        *_surgery(4, P, "BERT-base", []),
        *_surgery(8, P, "BERT-base", []),
        *_steps(10_000_000, "float32"),
        *_steps(10_000_000, "bfloat16"),
        *_programs((3, 8, 40)),
    ]


def quick() -> list[Case]:
    """Return every operation in every form, on few shapes."""
    P = 100_000
    return [
        *_matrices((3, 8), (1_000, P, 1_000_000), "float32"),
        Case("gramian", 3, P, "bfloat16"),
        Case("pcgrad", 3, P, "bfloat16"),
        *_variants(P),
        *_surgery(3, P, "pieces", SUPPRESSED[:3]),
        *_entries(3, P, "pieces"),
        Case("adamw", 3, P, shapes="pieces"),
        *_programs((3, 8)),
    ]


def _matrices(tasks: Sequence[int], sizes: Sequence[int], dtype: str) -> Iterator[Case]:
    return (Case(operation, T, P, dtype) for P, T, operation in product(sizes, tasks, MAIN))


def _variants(P: int) -> Iterator[Case]:
    return (Case(operation, 3, P) for operation in VARIANTS)


def _surgery(T: int, P: int, shapes: str, suppressed: Sequence[Suppressed], dtype: str = "float32") -> Iterator[Case]:
    """Yield the cases of a step's surgery: on the whole model, in groups, and under suppression."""
    for groups in ("model", "parameter"):
        yield Case("surgery", T, P, dtype, shapes=shapes, groups=groups)
    for p, block, scope in suppressed:
        yield Case("surgery", T, P, dtype, shapes=shapes, p=p, block=block, scope=scope)


def _entries(T: int, P: int, shapes: str) -> Iterator[Case]:
    return (Case(operation, T, P, shapes=shapes) for operation in ("gather", "scatter"))


def _steps(P: int, dtype: str) -> Iterator[Case]:
    """Yield AdamW steps along one gradient, along a combination of three, and along a suppressed combination."""
    for T in (1, 3):
        yield Case("adamw", T, P, dtype, shapes="pieces")
    for block in (1, 128):
        yield Case("adamw", 3, P, dtype, shapes="pieces", p=0.45, block=block)


def _programs(tasks: Sequence[int]) -> Iterator[Case]:
    yield from (Case(program, T, 0, S=S) for program, T, S in product(PROGRAMS, tasks, (1, 200)))
    yield from (Case(NETWORK, T, 0) for T in tasks)

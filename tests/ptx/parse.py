"""PTX text as functions and statements. What the names of instructions mean is not known here.

Triton writes a part of a kernel as inline assembly, and some of that on one line, between braces that are a scope of
their own: ``{ .reg .b32 tmp; mov.b64 {tmp, %r1}, %rd1; }``. A scope's registers are written before they are read, so
the same name may stand for one register in all scopes of a function.
"""

import re
from dataclasses import dataclass, field
from typing import NamedTuple


class PtxError(Exception):
    """PTX that the emulator does not know."""


class Address(NamedTuple):
    """``[base+offset]``."""

    base: str
    offset: str


Operand = str | Address | tuple[str, ...]
"""A register, a constant or a name; an address; or several of them: ``{a, b}``, ``(a, b)`` or ``a|b``."""


class Guard(NamedTuple):
    """``@p`` or ``@!p``: the statement is for the lanes where the predicate is so."""

    predicate: str
    negated: bool


class Statement(NamedTuple):
    """One instruction."""

    line: int
    guard: Guard | None
    opcode: str
    operands: tuple[Operand, ...]


class Parameter(NamedTuple):
    """A parameter of a function, with its type, as ``u64``."""

    name: str
    type: str


@dataclass
class Function:
    """A kernel (``entry``), or a function that kernels call."""

    name: str
    entry: bool
    parameters: list[Parameter]
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    """The number of the statement that follows each label."""


class Module(NamedTuple):
    """All functions of a text, and the number of threads that its kernel runs with."""

    functions: dict[str, Function]
    n_threads: int

    @property
    def kernel(self) -> Function:
        """Return the one kernel."""
        (kernel,) = (function for function in self.functions.values() if function.entry)
        return kernel


HEADER = re.compile(r"\.(entry|func)\s+([\w$.]+)\s*\(([^)]*)\)\s*([^{;]*)([{;])")
PIECE = re.compile(
    r"""\s*(?:
    (?P<label>[\w$]+):(?!:)
    | (?P<brace>[{}])                 # of a scope; a vector's belongs to its statement
    | (?P<directive>\.[^;\n]*;?)
    | (?P<statement>[^;]+);
    )""",
    re.VERBOSE,
)
STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", re.DOTALL)
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|\([^)]*\)|[^,\s][^,]*")
ADDRESS = re.compile(r"\[\s*([\w$%.]+)\s*(?:\+\s*(-?\w+)\s*)?\]")


def parse(text: str) -> Module:
    """Return the functions of ``text``.

    Raises:
        PtxError: the text has no kernel with a number of threads, or a statement has no known form.
    """
    text = re.sub(r"//.*", "", text)
    functions = {}
    n_threads = None
    for header in HEADER.finditer(text):
        kind, name, parameters, attributes, end = header.groups()
        if end == ";":  # declared, and defined later
            continue
        functions[name] = Function(
            name, kind == "entry", [_parameter(part) for part in parameters.split(",") if part.strip()]
        )
        _parse_body(functions[name], text, header.end())
        threads = re.search(r"\.reqntid\s+(\d+)", attributes)
        if threads:
            n_threads = int(threads[1])
    if n_threads is None:
        raise PtxError("no kernel that tells its number of threads")
    return Module(functions, n_threads)


def _parameter(text: str) -> Parameter:
    words = text.split()
    return Parameter(words[-1], words[1].removeprefix("."))


def _parse_body(function: Function, text: str, begin: int) -> None:
    """Fill in what stands from ``begin``, after the function's opening brace, up to the closing one."""
    depth, line, position = 1, 1 + text.count("\n", 0, begin), begin
    while depth:
        piece = PIECE.match(text, position)
        if piece is None:
            raise PtxError(f"{function.name} does not end")
        start = piece.start(piece.lastgroup)
        line += text.count("\n", position, start)
        if piece["brace"]:
            depth += 1 if piece["brace"] == "{" else -1
        elif piece["label"]:
            function.labels[piece["label"]] = len(function.statements)
        elif piece["statement"]:
            function.statements.append(_statement(piece["statement"], line))
        line += text.count("\n", start, piece.end())
        position = piece.end()


def _statement(text: str, line: int) -> Statement:
    match = STATEMENT.fullmatch(text)
    if match is None:
        raise PtxError(f"line {line}: no statement: {text}")
    negated, predicate, opcode, operands = match.groups()
    guard = Guard(predicate, bool(negated)) if predicate else None
    return Statement(line, guard, opcode, tuple(_operand(part, line) for part in OPERAND.findall(operands)))


def _operand(text: str, line: int) -> Operand:
    text = text.strip()
    if text.startswith(("{", "(")):
        return tuple(part.strip() for part in text[1:-1].split(",") if part.strip())
    if text.startswith("["):
        address = ADDRESS.fullmatch(text)
        if address is None:
            raise PtxError(f"line {line}: no address: {text}")
        return Address(address[1], address[2] or "0")
    if "|" in text:  # two results
        return tuple(text.split("|"))
    return text

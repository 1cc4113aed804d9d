"""A kernel's PTX as the arrays that the core runs: names become numbers of registers, of constants, of instructions."""

import ctypes
import re
import weakref
from collections.abc import Sequence

from tests.ptx.core_library import (
    EncodedCode,
    EncodedInstruction,
    Grid,
    ParameterValue,
    Range,
    Settings,
    StartRegisters,
    Trap,
    core,
)
from tests.ptx.instructions import Form, find
from tests.ptx.parse import Address, Function, Operand, PtxError, Statement, parse

SPECIAL = ["%tid.x", "%laneid"] + [f"%{name}.{axis}" for name in ("ctaid", "nctaid") for axis in "xyz"]
"""Registers that hold something when a program starts."""
NAMED = {"global_smem": 0}
"""Constants with a name: the beginning of shared memory."""
MESSAGE = 1000


class Program:
    """A kernel, ready to run.

    Attributes:
        name: the kernel's.
        parameters: its parameters, with their types.
        talks: whether its programs tell each other something, by atomics.
    """

    def __init__(self, ptx: str, shared_bytes: int) -> None:
        module = parse(ptx)
        kernel = module.kernel
        self.name = kernel.name
        self.parameters = kernel.parameters
        self.talks = any(
            s.opcode.startswith(("atom.", "red.")) for f in module.functions.values() for s in f.statements
        )
        encoder = _Encoder()
        numbers = [encoder.special(name) for name in SPECIAL]
        triple = ctypes.c_int32 * 3
        self._start = StartRegisters(*numbers[:2], triple(*numbers[2:5]), triple(*numbers[5:8]))
        self._registers = [encoder.parameter(kernel, parameter.name, "0") for parameter in kernel.parameters]
        functions = sorted(module.functions.values(), key=lambda function: not function.entry)
        try:
            for function in functions:
                encoder.add(function)
            self._code = encoder.finish(module.n_threads, shared_bytes)
        except PtxError as error:
            raise PtxError(f"{self.name}: {error}") from None
        weakref.finalize(self, core().free_code, self._code)

    def run(
        self, grid: Sequence[int], values: Sequence[int], ranges: Sequence[tuple[int, int]], settings: Settings
    ) -> int:
        """Run programs of a grid, and return how many instructions their warps have run.

        Args:
            grid: its sizes.
            values: the bits of the parameters.
            ranges: where global memory may be accessed: from an address up to another.
            settings: how.

        Raises:
            Trap: a program did what it must not do. The message names the kernel, and the line of its PTX.
        """
        given = [ParameterValue(*pair) for pair in zip(self._registers, values, strict=True)]
        message = ctypes.create_string_buffer(MESSAGE)
        n = core().run_code(
            self._code,
            0,
            ctypes.byref(self._start),
            (ParameterValue * len(given))(*given),
            len(given),
            ctypes.byref(Grid((ctypes.c_uint64 * 3)(*(*grid, 1, 1)[:3]))),
            (Range * len(ranges))(*ranges),
            len(ranges),
            ctypes.byref(settings),
            message,
            MESSAGE,
        )
        if n < 0:
            raise Trap(f"{self.name}: {message.value.decode()}")
        return n


class _Encoder:
    """Gives numbers to the names of all functions of a kernel."""

    def __init__(self) -> None:
        self._registers: dict[tuple[str, str], int] = {}
        self._constants: dict[int, int] = {}
        self._operations: dict[str, int] = {}
        self._functions: dict[str, int] = {}
        self._labels: dict[tuple[str, str], int] = {}
        self._targets: list[tuple[str, str, int] | None] = []
        self._instructions: list[EncodedInstruction] = []
        self._operands: list[int] = []

    def special(self, name: str) -> int:
        """Return the register that holds ``name`` from the start."""
        return self._register("", name)

    def parameter(self, function: Function, name: str, offset: str) -> int:
        """Return the register that stands for a parameter, in a function or in a call of one.

        A call of a function hands its arguments over in registers of their own, numbered as the parameters are.
        """
        if offset != "0":
            raise PtxError(f"parameter {name} has parts")
        if function.entry and any(name == parameter.name for parameter in function.parameters):
            return self._register(function.name, name)
        number = re.search(r"param_?(\d+)$", name)
        if number is None:
            raise PtxError(f"unknown parameter {name}")
        return self._register("arguments", number[1])

    def add(self, function: Function) -> None:
        """Add a function's statements."""
        begin = len(self._instructions)
        self._functions[function.name] = begin
        for label, number in function.labels.items():
            self._labels[function.name, label] = begin + number
        for statement in function.statements:
            self._add_statement(function, statement)

    def finish(self, n_threads: int, shared_bytes: int) -> int:
        """Return the core's handle of the code."""
        for instruction, target in zip(self._instructions, self._targets, strict=True):
            if target is not None:
                instruction.target = self._place(*target)
        for name in self._operations:
            if not core().has_operation(name.encode()):
                raise PtxError(f"the core has no operation {name}")
        code = EncodedCode(
            (EncodedInstruction * len(self._instructions))(*self._instructions),
            (ctypes.c_int32 * len(self._operands))(*self._operands),
            (ctypes.c_uint64 * len(self._constants))(*self._constants),
            (ctypes.c_char_p * len(self._operations))(*(name.encode() for name in self._operations)),
            len(self._instructions),
            len(self._operands),
            len(self._constants),
            len(self._registers),
            n_threads,
            shared_bytes,
        )
        return core().make_code(ctypes.byref(code))

    def _place(self, function: str, name: str, line: int) -> int:
        place = self._labels.get((function, name), self._functions.get(name))
        if place is None:
            raise PtxError(f"line {line}: no such label or function: {name}")
        return place

    def _add_statement(self, function: Function, statement: Statement) -> None:
        form = find(statement)
        operation = self._operations.setdefault(form.operation, len(self._operations))
        jumps = form.operation in ("bra", "call")
        self._targets.append((function.name, str(statement.operands[0]), statement.line) if jumps else None)
        outputs, inputs = ([], []) if jumps else self._encode(function, statement, form)
        guard = statement.guard
        self._operands += [*outputs, *inputs]
        self._instructions.append(
            EncodedInstruction(
                operation,
                statement.line,
                -1 if guard is None else self._register(function.name, guard.predicate),
                0 if guard is None else guard.negated,
                -1,
                len(outputs),
                len(inputs),
            )
        )

    def _encode(self, function: Function, statement: Statement, form: Form) -> tuple[list[int], list[int]]:
        """Return the numbers of results and of inputs."""
        if statement.opcode.startswith(("ld.param", "st.param")):
            to, source = (self._one(function, operand) for operand in statement.operands)
            return [to], [source]
        outputs: list[int] = []
        inputs: list[int] = []
        for i, (kind, operand) in enumerate(zip(form.row.kinds, statement.operands, strict=True)):
            if kind[0] != "-" and not kind[0].isdigit():
                (outputs if i < form.row.n_outputs else inputs).extend(self._numbers(function, operand))
        _check_vector(statement, len(outputs), len(inputs))
        return outputs, inputs

    def _numbers(self, function: Function, operand: Operand) -> list[int]:
        if isinstance(operand, Address):
            return [self._number(function, operand.base), self._number(function, operand.offset)]
        if isinstance(operand, tuple):
            return [self._number(function, part) for part in operand]
        return [self._number(function, operand)]

    def _one(self, function: Function, operand: Operand) -> int:
        if isinstance(operand, Address):
            return self.parameter(function, operand.base, operand.offset)
        return self._number(function, str(operand))

    def _number(self, function: Function, text: str) -> int:
        """Return the number of a register, or ~n for the constant n."""
        if text in SPECIAL:
            return self.special(text)
        if text in NAMED:
            return ~self._constants.setdefault(NAMED[text], len(self._constants))
        if re.fullmatch(r"%\w+|[A-Za-z_]\w*", text):
            return self._register(function.name, text)
        return ~self._constants.setdefault(_bits(text), len(self._constants))

    def _register(self, function: str, name: str) -> int:
        return self._registers.setdefault((function, name), len(self._registers))


def _check_vector(statement: Statement, n_outputs: int, n_inputs: int) -> None:
    """Check that a load or a store has as many registers as its opcode says; an address gives two inputs more."""
    memory = re.fullmatch(r"(ld|st)\.(?:global|shared).*?(?:\.v([24]))?\.[bs]\d+", statement.opcode)
    if memory and (n_outputs if memory[1] == "ld" else n_inputs - 2) != int(memory[2] or 1):
        raise PtxError(f"line {statement.line}: {statement.opcode} of {statement.operands}")


def _bits(constant: str) -> int:
    """Return the 64 bits of a constant; a narrower use leaves out the upper ones."""
    if re.match("0[fFdD]", constant):  # the bits of a float32 or float64
        return int(constant[2:], 16)
    try:
        return int(constant.rstrip("U"), 0) & ((1 << 64) - 1)
    except ValueError:
        raise PtxError(f"unknown constant or register {constant}") from None

"""``gradkern info``: what is installed, what serves which device and why, and whether every operator is right here.

Each operator runs on every device in every dtype and is compared with :mod:`gradkern.reference`, which computes in
float64 on the CPU. An error is measured against the size of the terms that were summed, not against their sum, which
may cancel.
"""

import importlib.metadata
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

import gradkern
from gradkern import combine, gramian, project, reference
from gradkern.ops import backend
from gradkern.ops.schema import DTYPES, arithmetic_dtype

ops = torch.ops.gradkern

ALLOWED = {torch.float32: 3e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""How far a result may be off, by its dtype. float64: some hundred roundings of 1e-16. float32: the same of 6e-8.
bfloat16 and float16: the arithmetic is float32 and only the store rounds, by half a unit in the last place of 8 and
11 bits; twice that is allowed."""

SHAPES = [(1, 1), (3, 9005), (13, 4109), (40, 4109)]
"""T x P: the least; T on both sides of where the kernels change their ways; P not whole chunks or tiles, and three less
than a multiple of 16, so that the rows of ``_matrix`` start where 128-bit loads are made."""
N_SEGMENTS = 2

Comparison = tuple[Tensor, Tensor, Tensor]
"""A result, what it should be, and the size of the terms that were summed: three tensors of one shape."""


def info() -> int:
    """Print versions, devices, back ends and the self-check. Returns the exit status, 1 if any operator is wrong."""
    for name, version in versions().items():
        print(f"{name:10}{version}")
    print("\ndevices and the back ends that serve them")
    for device in devices():
        name, reason = backend(device.type)
        print(f"{device!s:10}{describe(device)}\n{'':10}{name}: {reason}")
    print(
        "\nself-check against gradkern.reference: largest error relative to the terms summed, by the dtype of the rows"
    )
    print(_line("", "", [_short(dtype) for dtype in DTYPES]))
    failed = 0
    for device in devices():
        for operator in CHECKS:
            outcome = check(operator, device)
            failed += outcome.problem is not None
            errors = [f"{outcome.errors[d]:.1e}" if d in outcome.errors else "-" for d in DTYPES]
            print(f"{_line(operator, str(device), errors)}  {outcome.verdict}", flush=True)
    n = len(CHECKS) * len(devices())
    print(f"{failed} of {n} checks FAILED" if failed else f"all {n} checks OK")
    return 1 if failed else 0


def versions() -> dict[str, str]:
    """What is installed, by name; for Triton, why it is not."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError as error:
        triton_version = f"none: {error}" + ("" if platform.system() == "Linux" else "; it exists for Linux only")
    return {
        "gradkern": gradkern.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "numpy": importlib.metadata.version("numpy"),
    }


def devices() -> list[torch.device]:
    """The CPU and every CUDA (or ROCm) device."""
    return [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]


def describe(device: torch.device) -> str:
    """What kind of device this is."""
    if device.type == "cpu":
        return f"{platform.machine()}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return f"{properties.name}, {properties.gcnArchName}"
    return f"{properties.name}, compute capability {properties.major}.{properties.minor}"


@dataclass(frozen=True)
class Outcome:
    """What the check of an operator found.

    Attributes:
        errors: the largest error in each dtype that was reached.
        problem: what is wrong, or None.
    """

    errors: dict[torch.dtype, float]
    problem: str | None

    @property
    def verdict(self) -> str:
        """OK, or FAILED and why."""
        return "OK" if self.problem is None else f"FAILED: {self.problem}"


def check(operator: str, device: torch.device) -> Outcome:
    """Compare an operator, one of ``CHECKS``, with the reference. Whatever it raises is a failure too."""
    errors: dict[torch.dtype, float] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return Outcome(errors, next(_wrong(operator, device, errors), None))
        except Exception as error:  # such as a kernel that does not compile: the other operators are still checked
            return Outcome(errors, f"{type(error).__name__}: {error}")


def _wrong(operator: str, device: torch.device, errors: dict[torch.dtype, float]) -> Iterator[str]:
    """Results that are further off than allowed, in words. ``errors`` takes the largest error of each dtype so far."""
    for dtype in DTYPES:
        for result, expected, size in CHECKS[operator](dtype, device):
            error, allowed = _error(result, expected, size), ALLOWED[result.dtype]
            right = error <= allowed  # NaN is not
            errors[dtype] = max(errors.get(dtype, 0.0), error) if right else error
            if not right:
                yield f"{_short(dtype)}, {tuple(result.shape)}: error {error:.1e}, at most {allowed:.0e} allowed"


def _gramian(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for T, P in SHAPES:
        J, on_device = _matrix(T, P, dtype, device)
        for offsets in _offsets(P):
            M = gramian(on_device, _tensor(offsets))
            yield from zip(M.view(-1, T, T), *_products(_blocks(J, offsets)), strict=True)


def _gramian_tensors(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for T, P in SHAPES:
        cut = _cut(_matrix(T, P, dtype, device)[0], device)
        M = ops.gramian(cut.grads, cut.segments, N_SEGMENTS)
        yield from zip(M, *_products(cut.blocks()), strict=True)


def _cross(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for T, P in SHAPES:
        J, on_device = _matrix(T + 2, P, dtype, device)
        for offsets in _offsets(P):
            K = ops.cross(on_device[:T], on_device[T:], _tensor(offsets))
            corners = ([M[:T, T:] for M in Ms] for Ms in _products(_blocks(J, offsets)))
            yield from zip(K.view(-1, T, 2), *corners, strict=True)


def _combine(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for T, P in SHAPES:
        J, on_device = _matrix(T, P, dtype, device)
        for offsets in _offsets(P):
            blocks = _blocks(J, offsets)
            w = _weights((len(blocks), T), dtype)
            g = combine(on_device, (w if offsets else w[0]).to(device), _tensor(offsets))
            sums = [_sums(block, ws[None]) for block, ws in zip(blocks, w, strict=True)]
            yield g, torch.cat([expected[0] for expected, _ in sums]), torch.cat([size[0] for _, size in sums])


def _combine_tensors(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for T, P in SHAPES:
        cut = _cut(_matrix(T, P, dtype, device)[0], device)
        w = _weights((N_SEGMENTS, T), dtype)
        out = cut.empty(1, device)
        ops.combine(cut.grads, w.to(device), cut.segments, out)
        for k, (piece, s) in enumerate(zip(cut.pieces, cut.segments, strict=True)):
            expected, size = _sums(piece, w[s][None])
            yield out[k], expected[0], size[0]


def _project(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for T, P in SHAPES:
        J, on_device = _matrix(T, P, dtype, device)
        for offsets in _offsets(P):
            blocks = _blocks(J, offsets)
            W = _weights((len(blocks), 2, T), dtype)
            Y = project(on_device, (W if offsets else W[0]).to(device), _tensor(offsets))
            sums = [_sums(block, Ws) for block, Ws in zip(blocks, W, strict=True)]
            yield Y, torch.cat([expected for expected, _ in sums], 1), torch.cat([size for _, size in sums], 1)


def _project_tensors(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for T, P in SHAPES:
        cut = _cut(_matrix(T, P, dtype, device)[0], device)
        W = _weights((N_SEGMENTS, 2, T), dtype)
        out = cut.empty(2, device)
        ops.project(cut.grads, W.to(device), cut.segments, out)
        for k, (piece, s) in enumerate(zip(cut.pieces, cut.segments, strict=True)):
            yield torch.stack(out[k :: len(cut.pieces)]), *_sums(piece, W[s])


def _pcgrad(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    """The projected gradients themselves, C J: the reference has no coefficients."""
    if dtype != arithmetic_dtype(dtype):
        return  # a Gramian is never stored in 16 bits
    for T, _ in SHAPES:
        blocks = [_matrix(T, 64, torch.float64, device)[0] for _ in range(N_SEGMENTS)]
        M = torch.stack([reference.gramian(list(block)) for block in blocks]).to(dtype)
        for keys in (torch.rand(N_SEGMENTS, T, T), torch.rand(1, T, T)):
            C = ops.pcgrad(M.to(device), keys.to(device)).cpu()
            for block, c, order in zip(blocks, C, keys.argsort(-1).expand(M.shape).tolist(), strict=True):
                expected = torch.stack(reference.pcgrad(list(block), order))
                yield (c.double() @ block).to(dtype), expected, c.double().abs() @ block.abs()


CHECKS: dict[str, Callable[[torch.dtype, torch.device], Iterator[Comparison]]] = {
    "gramian": _gramian,
    "gramian.tensors": _gramian_tensors,
    "cross": _cross,
    "combine": _combine,
    "combine.tensors": _combine_tensors,
    "project": _project,
    "project.tensors": _project_tensors,
    "pcgrad": _pcgrad,
}
"""Every operator in ``torch.ops.gradkern``, by name and overload. Those on a matrix also run with ``offsets``."""


@dataclass(frozen=True)
class Cut:
    """A matrix cut into parameters, whose gradients are tensors of their own; one of them is missing.

    Attributes:
        pieces: (T, numel) for each parameter, on the CPU; zeros where the gradient is missing.
        grads: the gradients on the device, tasks times parameters, None for the missing one.
        segments: each parameter's segment.
    """

    pieces: list[Tensor]
    grads: list[Tensor | None]
    segments: list[int]

    def blocks(self) -> list[Tensor]:
        """(T, columns) for each segment."""
        none = self.pieces[0][:, :0]
        members = [[p for p, s in zip(self.pieces, self.segments, strict=True) if s == n] for n in range(N_SEGMENTS)]
        return [torch.cat([none, *pieces], 1) for pieces in members]

    def empty(self, n_rows: int, device: torch.device) -> list[Tensor]:
        """Tensors to write ``n_rows`` results into, full of NaN, so that what is not written shows."""
        return [piece.new_full(piece.shape[1:], math.nan).to(device) for _ in range(n_rows) for piece in self.pieces]


def _cut(J: Tensor, device: torch.device) -> Cut:
    T, P = J.shape
    pieces = [piece.clone() for piece in J.split([n for n in (P // 2, P // 3, P - P // 2 - P // 3) if n], 1)]
    grads: list[Tensor | None] = [piece[t].to(device, copy=True) for t in range(T) for piece in pieces]
    if T > 1:
        grads[1] = None
        pieces[1][0] = 0
    return Cut(pieces, grads, [k % N_SEGMENTS for k in range(len(pieces))])


def _matrix(T: int, P: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The same random rows on the CPU and on ``device``, some distance apart in memory."""
    rows = torch.randn((T, P + 3), dtype=torch.float64).to(dtype)
    return rows[:, :P], rows.to(device)[:, :P]


def _weights(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random weights for rows of ``dtype``; with two rows or more one of them has the weight 0."""
    w = torch.randn(shape, dtype=torch.float64).to(arithmetic_dtype(dtype))
    w[..., 1:2] = 0
    return w


def _offsets(P: int) -> list[list[int] | None]:
    """No segments, and three, one of them empty."""
    return [None, [0, P // 3, P // 3, P]]


def _tensor(offsets: list[int] | None) -> Tensor | None:
    return None if offsets is None else torch.tensor(offsets)


def _blocks(J: Tensor, offsets: list[int] | None) -> list[Tensor]:
    return [J] if offsets is None else [J[:, a:b] for a, b in pairwise(offsets)]


def _products(blocks: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The Gramian of each block, and for each entry the product of the two norms."""
    Ms = [reference.gramian(list(block)) for block in blocks]
    norms = [M.diagonal().sqrt() for M in Ms]
    return Ms, [torch.outer(n, n) for n in norms]


def _sums(block: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
    """W J, and the same of absolute values."""
    rows = list(block)
    return reference.project(rows, W.tolist()), reference.project([g.abs() for g in rows], W.abs().tolist())


def _error(result: Tensor, expected: Tensor, size: Tensor) -> float:
    """The largest |result - expected| / size; NaN if any entry is."""
    if result.shape != expected.shape:
        raise ValueError(f"shape {tuple(result.shape)} in place of {tuple(expected.shape)}")
    error = (result.double().cpu() - expected).abs()
    # Below its smallest normal number a dtype rounds to a fixed step, not in proportion; float16 gets there.
    relative = error / size.clamp_min(torch.finfo(result.dtype).smallest_normal)
    return relative.max().item() if relative.numel() else 0.0


def _line(operator: str, device: str, errors: Sequence[str]) -> str:
    return f"{operator:17}{device:8}" + "".join(f"{error:>10}" for error in errors)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

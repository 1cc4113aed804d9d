"""Which back end serves which device. PyTorch's serves all; Triton's kernels take CUDA tensors over where they can."""

import torch

from gradkern.kernels import settings
from gradkern.ops.one_launch import unfused  # noqa: F401  (register)
from gradkern.ops.pytorch import adamw, entries, host_programs, pcgrad_matrix, rows, suppressed  # noqa: F401  (register)
from gradkern.ops.registration import serving

_why_no_triton: str | None = None
if torch.version.cuda is None and torch.version.hip is None:
    _why_no_triton = "this PyTorch is built without CUDA and ROCm"
else:
    try:
        from gradkern.ops.one_launch import surgery  # noqa: F401  (register)
        from gradkern.ops.triton import rows as _triton_rows  # noqa: F401  (register)
    except ImportError as error:  # there is no Triton for every platform, and one may be there that does not load
        _why_no_triton = f"Triton cannot be imported ({error})"


def one_launch(device_type: str, T: int, dtype: torch.dtype) -> range:
    """For how many numbers of T gradients one launch does the whole surgery."""
    served = device_type in serving["gradkern::pcgrad.tensors"]
    return settings.one_launch(T, dtype.itemsize) if served else range(0)


def backend(device_type: str) -> tuple[str, str]:
    """The back end that serves tensors on devices of ``device_type``, such as "cpu" or "cuda", and why.

    Returns:
        "triton" or "pytorch", and a sentence.
    """
    if device_type == "cpu":
        return "pytorch", "CPU tensors are served by blocked PyTorch operations"
    if device_type != "cuda":
        return "pytorch", "the Triton kernels are for CUDA and ROCm devices"
    if _why_no_triton is not None:
        return "pytorch", f"{_why_no_triton}; every step then waits on the device"
    return "triton", "Triton is installed and PyTorch is built for the device"

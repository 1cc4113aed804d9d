"""Which back end serves which device. PyTorch's serves all; Triton's kernels take CUDA tensors over where they can."""

from importlib.util import find_spec

import torch

from gradkern.ops import pytorch  # noqa: F401  (registers)

_WHY_NO_TRITON = (
    "this PyTorch is built without CUDA and ROCm"
    if torch.version.cuda is None and torch.version.hip is None
    else "Triton is not installed"
    if find_spec("triton") is None
    else None
)

if _WHY_NO_TRITON is None:
    from gradkern.ops import cuda  # noqa: F401  (registers)


def backend(device_type: str) -> tuple[str, str]:
    """The back end that serves tensors on devices of ``device_type``, such as "cpu" or "cuda", and why.

    Returns:
        "triton" or "pytorch", and a sentence.
    """
    if device_type == "cpu":
        return "pytorch", "CPU tensors are served by blocked PyTorch operations"
    if device_type != "cuda":
        return "pytorch", "the Triton kernels are for CUDA and ROCm devices"
    if _WHY_NO_TRITON is not None:
        return "pytorch", f"{_WHY_NO_TRITON}; every step then waits on the device"
    return "triton", "Triton is installed and PyTorch is built for the device"

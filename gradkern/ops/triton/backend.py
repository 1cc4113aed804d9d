"""The Triton back end."""

import torch

from gradkern.ops.devices import GPU
from gradkern.ops.registry import Backend

BACKEND = Backend("triton", GPU, "Triton is installed and PyTorch is built for the device")
if torch.version.cuda is None and torch.version.hip is None:
    BACKEND.unavailable = "this PyTorch is built without CUDA and ROCm"

implements = BACKEND.implements

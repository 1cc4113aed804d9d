"""The types of devices that gradkern tells apart, spelled once."""

import torch

GPU = "cuda"
"""PyTorch's name for the devices of CUDA and of ROCm."""
CPU = torch.device("cpu")

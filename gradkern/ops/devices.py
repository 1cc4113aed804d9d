"""The device type of GPUs, spelled once."""

GPU = "cuda"
"""PyTorch's name for the devices of CUDA and of ROCm."""

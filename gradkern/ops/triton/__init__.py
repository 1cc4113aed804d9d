"""The Triton back end serves CUDA and ROCm devices."""

"""The list of packages, which ``pyproject.toml`` cannot say: every folder of gradkern's, and one from beside it."""

from setuptools import find_packages, setup

# Read from kernels/ itself and not through the link gradkern/kernels, which a checkout without symlinks does not have.
setup(
    packages=[*find_packages(include=["gradkern", "gradkern.*"]), "gradkern.kernels"],
    package_dir={"gradkern.kernels": "kernels"},
)

"""The checkout without an installation: PYTHONPATH finds everything but the kernels, to which a link leads."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]


def link_kernels(root: Path = ROOT) -> None:
    """Make ``gradkern/kernels`` lead to ``kernels``.

    It is a link in the repository. A copy of the checkout may lack it, and Git writes a small file in its place where
    links are switched off.
    """
    link = root / "gradkern" / "kernels"
    if (link / "launch.py").exists():
        return
    if link.is_file() or link.is_symlink():
        link.unlink()
    os.symlink(Path("..") / "kernels", link)

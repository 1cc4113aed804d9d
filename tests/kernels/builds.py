"""The builds of all kernels for GPUs that are not here, in processes of their own beside other tests.

They take minutes, and this process may have told Triton to interpret. For sm_90 each kernel is built at every setting,
and for other targets once in float32 and in bfloat16. ``GRADKERN_AOT`` in the environment changes that: with ``brief``
sm_90 is as the others, and with ``whole`` all are as sm_90.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


WHOLE = {None: ("--whole", "sm_90"), "brief": ("--whole",), "whole": ()}
"""The arguments of ``tests/aot.py`` by what ``GRADKERN_AOT`` says."""


class Builds:
    """The builds of ``tests/aot.py``."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start them."""
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, str(ROOT / "tests" / "aot.py"), "--json", *WHOLE[os.environ.get("GRADKERN_AOT")]]
        self._process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def reports(self) -> list[dict[str, Any]]:
        """Return the reports of all builds."""
        if self._process is None:
            self.start()
        assert self._process is not None
        out, err = self._process.communicate()
        assert self._process.returncode == 0, err[-4000:]
        return json.loads(out)

    def stop(self) -> None:
        """End them, if nobody has waited for them."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()


BUILDS = Builds()

"""Settings that serve every device for a while, in place of its table."""

from gradkern.kernels.served import Choices, served
from gradkern.ops.pytorch.chunks import cut, even_width


class Forced:
    """Let ``choices`` serve every device within a ``with`` block, which may be entered again.

    It is for measuring and checking settings. Whoever computes in another thread meanwhile gets them too.
    """

    def __init__(self, choices: Choices) -> None:
        self.choices = choices

    def __enter__(self) -> None:
        self._before = served.table
        served.table = lambda device: self.choices
        _forget()

    def __exit__(self, *error: object) -> None:
        served.table = self._before
        _forget()


def _forget() -> None:
    served.clear()
    cut.cache_clear()
    even_width.cache_clear()

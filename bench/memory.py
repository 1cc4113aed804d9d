"""The peak memory of a call, as the library itself measures it for advice."""

from gradkern.advice.memory import peak

__all__ = ["peak"]

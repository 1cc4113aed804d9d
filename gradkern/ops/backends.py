"""The choice of the back end that serves a device."""

from gradkern import ops
from gradkern.ops import tuned  # noqa: F401  (the tables of settings)
from gradkern.ops.registry import DEFAULT, backends, load_backends

load_backends(ops)


def backend(device_type: str) -> tuple[str, str]:
    """Return the name of the back end that serves devices of a type, and the reason.

    Args:
        device_type: such as "cpu" or "cuda".

    Returns:
        "triton", "pytorch" or another back end's name, and a sentence that gives the reason.
    """
    default, found = backends[DEFAULT], backends.get(device_type)
    if found is None:
        return default.name, default.reason
    if found.unavailable is not None:
        return default.name, f"{found.unavailable}; every step then waits on the device"
    return found.name, found.reason

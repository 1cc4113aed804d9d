"""Starts the builds for other GPUs before the first test, if a test needs them."""

import os

import pytest

from tests.kernels.builds import BUILDS


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the builds. With pytest-xdist each worker has all tests, and the one that needs them starts them."""
    if "PYTEST_XDIST_WORKER" not in os.environ and any(item.path.name == "test_aot.py" for item in session.items):
        BUILDS.start()


def pytest_unconfigure() -> None:
    """End them."""
    BUILDS.stop()

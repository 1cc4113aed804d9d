"""The ranks on which all tests of this folder run."""

from collections.abc import Iterator

import pytest

from tests.distributed.pool import Pool

RANKS = 4


@pytest.fixture(scope="session")
def _pools() -> Iterator[list[Pool]]:
    pools: list[Pool] = []
    yield pools
    for pool in pools:
        pool.close()


@pytest.fixture
def pool(_pools: list[Pool], tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """Give four ranks; other ones after a test that has lost them."""
    if not _pools or not _pools[-1].alive:
        _pools.append(Pool(RANKS, tmp_path_factory.mktemp("ranks")))
    return _pools[-1]

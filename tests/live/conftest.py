"""Where recordings are kept that many tests look at."""

import pytest

from tests.live.saved import KEPT


@pytest.fixture(scope="session", autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory) -> None:
    """For this session."""
    KEPT.folder = tmp_path_factory.mktemp("kept")

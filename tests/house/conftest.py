from __future__ import annotations

import pytest

from tests.house.sources import Source, read_sources


@pytest.fixture(scope="session")
def sources() -> tuple[Source, ...]:
    """Every source file of the three packages."""
    found = read_sources()
    assert len(found) > 20, "the source files were not found"
    return found

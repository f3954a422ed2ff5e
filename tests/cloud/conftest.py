from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # import mode "importlib" leaves it out; cloud_fleet.py lies there

from cloud_fleet import Clock, Site


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
def began() -> int:
    """Unix seconds at which the site's clock stands at first."""
    return int(Clock.now)


@pytest.fixture
async def site(tmp_path: Path, began: int) -> AsyncIterator[Site]:
    """A running aggregator: three rounds, two devices a round."""
    site = Site.make(tmp_path)
    site.clock.now = began
    await site.start()
    yield site
    await site.close()

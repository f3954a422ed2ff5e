"""An honest aggregator on loopback and a home enrolled with it."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # import mode "importlib" leaves it out; device_*.py lie there

from device_bench import Bench
from device_bundle import TinyBundle, make_bundle
from device_server import Aggregator, Serving

from edge_runtime.device.enrolment import enrol
from edge_runtime.device.files import write_bytes
from edge_runtime.device.home import Home
from edge_runtime.device.host import Host
from edge_runtime.device.storage_key import default_file
from tests.edge.encrypted import KEY


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> TinyBundle:
    return make_bundle(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
async def aggregator(tiny_bundle: TinyBundle) -> AsyncIterator[Aggregator]:
    async with Serving(Aggregator(tiny_bundle)) as serving:
        yield serving


@pytest.fixture
async def bench(aggregator: Aggregator, tmp_path: Path) -> Bench:
    home = Home(tmp_path / "home", KEY)
    write_bytes(default_file(home.folder), KEY.text().encode())  # where commands look for it
    await enrol(home, server=aggregator.url, token=aggregator.token("pi-1"), device="pi-1", host=Host())
    return Bench(home, aggregator)

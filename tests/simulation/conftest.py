"""One bundle, config and set of keys for all scenarios."""

from __future__ import annotations

import pytest

from tests.simulation.scenario import make_task
from tests.simulation.server import Task


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("simulation"))

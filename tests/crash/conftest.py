"""One task that all scenarios copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash.site import make_task


@pytest.fixture(scope="session")
def crash_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_task(tmp_path_factory.mktemp("crash") / "task")

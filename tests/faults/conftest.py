"""The undisturbed run that all others are compared with, once per test process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.survive import undisturbed


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undisturbed(tmp_path_factory.mktemp("undisturbed"))

"""The benchmark's ranks are forked from the same server as other tests' processes.

Not covered: the figures themselves (`test_parts.py`).
"""

from __future__ import annotations

import pytest

from tests import preloaded


@pytest.fixture(scope="session", autouse=True)
def server() -> None:
    preloaded.start()

"""What tests of several samples use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.redis import Redis, redis_server


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    """A server of this test's own; skips where there is none."""
    with redis_server(tmp_path) as running:
        yield running

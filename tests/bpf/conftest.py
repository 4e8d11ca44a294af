"""Root tests of the kernel programs: one set of maps and programs for the session, empty for each test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from harness import Harness


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.root)


@pytest.fixture(scope="session")
def loaded() -> Iterator[Harness]:
    with Harness.open() as harness:
        yield harness


@pytest.fixture
def kernel(loaded: Harness) -> Iterator[Harness]:
    """The real programs with empty maps."""
    loaded.clear()
    yield loaded
    loaded.clear()

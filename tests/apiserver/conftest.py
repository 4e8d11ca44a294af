"""One API server for all tests that read a cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from api_server import ApiServer, missing, running_api_server


@pytest.fixture(scope="session")
def api_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    if reason := missing():
        if os.environ.get("CI"):
            pytest.fail(f"cannot run in CI: {reason}", pytrace=False)
        pytest.skip(reason)
    with running_api_server(tmp_path_factory.mktemp("apiserver")) as server:
        yield server

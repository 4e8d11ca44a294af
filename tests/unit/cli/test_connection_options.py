"""Where a node's processes look for the controller, in a pod and elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshbridge.cli.connection import CA_FILE, SERVICE_NAME, TOKEN_FILE, Connection, connection
from meshbridge.errors import SettingsError

POD = {"MESHBRIDGE_CONTROLLER_SERVICE_HOST": "10.96.0.7", "MESHBRIDGE_CONTROLLER_SERVICE_PORT": "9400"}


def test_in_a_pod_the_service_is_found_without_dns() -> None:
    assert connection(None, None, None, None, POD) == Connection("10.96.0.7:9400", TOKEN_FILE, CA_FILE, SERVICE_NAME)
    six = {**POD, "MESHBRIDGE_CONTROLLER_SERVICE_HOST": "fd00::7"}
    assert connection(None, None, "other", None, six) == Connection("[fd00::7]:9400", TOKEN_FILE, CA_FILE, "other")


def test_what_is_told_counts() -> None:
    found = connection("unix:/s", None, None, Path("token"), POD)
    assert found == Connection("unix:/s", Path("token"))


@pytest.mark.parametrize(
    "environment",
    [{}, {**POD, "MESHBRIDGE_CONTROLLER_SERVICE_PORT": "tcp://x"}, {**POD, "MESHBRIDGE_CONTROLLER_SERVICE_HOST": ""}],
    ids=["no pod", "no port", "no host"],
)
def test_without_either_it_is_said_what_is_missing(environment: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match="MESHBRIDGE_CONTROLLER_SERVICE_HOST"):
        connection(None, None, None, None, environment)


def test_a_controller_that_is_named_needs_a_token() -> None:
    with pytest.raises(SettingsError, match="--token-file"):
        connection("unix:/s", None, None, None, {})

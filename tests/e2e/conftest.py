"""One cluster for all tests of this folder, and what is kept of it when one fails."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import cluster as clusters
import control_plane
import pytest
from cluster import Cluster
from installed import Installed
from installed import image as meshbridge_image
from kubectl import Kubectl, wait_until
from workloads import namespace

LOGS = Path(os.environ.get("MESHBRIDGE_E2E_LOGS", "/var/cache/meshbridge/e2e/logs"))
_numbers = itertools.count(1)
_running: list[Cluster] = []


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running cluster. With MESHBRIDGE_E2E_REUSE=1 the one that up.py started, which then stays."""
    found = clusters.attach() if os.environ.get("MESHBRIDGE_E2E_REUSE") else None
    if found:
        _running.append(found)
        yield found
        return
    with clusters.only_one():
        started = clusters.start(say=lambda what: print(f"e2e: {what}", flush=True))
        _running.append(started)
        try:
            yield started
        finally:
            started.shut_down()


@pytest.fixture(scope="session")
def kubectl(cluster: Cluster) -> Kubectl:
    return cluster.kubectl


@pytest.fixture(scope="session")
def installed(cluster: Cluster) -> Installed:
    """MeshBridge of this source, installed in the cluster by its own command and serving."""
    name, archive = meshbridge_image()
    cluster.import_images(archive)
    found = Installed(cluster)
    found.install(name)
    return found


@pytest.fixture
def make_namespace(kubectl: Kubectl) -> Iterator[Callable[..., str]]:
    """Makes namespaces of new names, gone after the test."""
    made: list[str] = []

    def make(prefix: str = "e2e", *, injected: bool = False) -> str:
        name = f"{prefix}-{os.getpid()}-{next(_numbers)}"
        kubectl.apply(namespace(name, injected=injected))
        made.append(name)
        wait_until(lambda: kubectl.exists("serviceaccount", "default", name), f"{name} takes pods")
        return name

    yield make
    for name in made:
        kubectl.delete("namespace", name, wait=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and _running:
        kept = LOGS / item.name
        _running[0].collect(kept)
        report.sections.append(("cluster", f"its logs and objects are in {kept}"))
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for each in items:
        if Path(__file__).parent in each.path.parents:
            each.add_marker(pytest.mark.root)
            each.add_marker(pytest.mark.timeout(600))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if reason := control_plane.missing():
        if os.environ.get("CI"):
            pytest.fail(f"cannot run in CI: {reason}", pytrace=False)
        pytest.skip(reason)

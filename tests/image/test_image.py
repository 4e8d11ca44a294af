"""What is in the image, what is not, and that it runs as the manifests run it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from container import REPO, UNPRIVILEGED, Image

from meshbridge import __version__

PIN = Path("/sys/fs/bpf/meshbridge-image-test")
IMPORTS = """
import importlib, pkgutil, meshbridge
left_out = ("meshbridge.demo", "meshbridge.bench", "meshbridge.cli.demo", "meshbridge.cli.bench")
names = [m.name for m in pkgutil.walk_packages(meshbridge.__path__, "meshbridge.", onerror=print)]
for name in names:
    if not name.startswith(left_out) and not name.endswith("bcc_child"):
        importlib.import_module(name)
print(len(names))
"""
LOAD = """
import pathlib
from meshbridge.datapath.loader import open_datapath
with open_datapath(pathlib.Path("{pin}"), cache=pathlib.Path("/nonexistent")) as datapath:
    print(datapath.from_pod > 0, datapath.to_pod > 0)
"""


def test_it_runs_as_nobody_with_everything_read_only(image: Image) -> None:
    assert image.config["config"]["User"] == f"{UNPRIVILEGED}:{UNPRIVILEGED}"
    assert image.config["config"]["Entrypoint"] == ["meshbridge"]
    said = image.run("meshbridge", "--version")
    assert (said.returncode, __version__ in said.stdout) == (0, True), said.stderr
    assert image.run("id", "-u").stdout.strip() == str(UNPRIVILEGED)
    assert image.run("touch", "/opt/meshbridge/x").returncode != 0


def test_every_module_of_the_components_is_there_with_what_it_imports(image: Image) -> None:
    said = image.run("python", "-c", IMPORTS, timeout_s=120)
    assert said.returncode == 0, said.stderr
    assert int(said.stdout) > 100


def test_probes_find_out_that_nothing_serves(image: Image) -> None:
    said = image.run("meshbridge", "health", "127.0.0.1:9401")
    assert (said.returncode, "does not answer" in said.stderr) == (1, True), said


def test_it_can_print_what_installs_it(image: Image) -> None:
    said = image.run("meshbridge", "install", "--dry-run", "client", "-o", "yaml")
    assert said.returncode == 0, said.stderr
    kinds = {each["kind"] for each in yaml.safe_load_all(said.stdout)}
    assert {"DaemonSet", "Deployment", "CustomResourceDefinition", "ValidatingWebhookConfiguration"} <= kinds


def test_no_compiler_no_headers_and_nothing_to_install_with(image: Image) -> None:
    tools = ("gcc", "cc", "clang", "ld", "as", "make", "pip", "pip3", "bpftool")
    found = [tool for tool in tools for folder in ("usr/bin", "usr/local/bin", "opt/meshbridge/bin")
             if (image.root / folder / tool).exists()]  # fmt: skip
    libraries = [path.name for pattern in ("libLLVM*", "libbcc*", "libclang*") for path in image.root.rglob(pattern)]
    headers = list((image.root / "usr/src").glob("linux-headers*")) + list((image.root / "usr/include").glob("linux"))
    caches = list(image.root.glob("root/.cache/pip")) + list(image.root.glob("var/lib/apt/lists/*_Packages"))
    assert [found, libraries, headers, caches] == [[], [], [], []]


def test_it_is_small(image: Image) -> None:
    assert image.archive.stat().st_size < 300e6


def test_the_tools_that_read_pods_redirect_rules_are_there(image: Image) -> None:
    for tool in ("iptables-nft-save", "iptables-legacy-save", "ip6tables-nft-save", "nft"):
        assert (image.root / "usr/sbin" / tool).is_symlink() or (image.root / "usr/sbin" / tool).exists(), tool


def test_the_cni_plugin_is_a_program_that_needs_nothing(image: Image) -> None:
    plugin = image.root / "usr/lib/meshbridge/meshbridge-cni"
    headers = subprocess.check_output(["readelf", "--program-headers", plugin], text=True)
    assert ("INTERP" in headers, plugin.stat().st_mode & 0o111 != 0) == (False, True)


def test_manifests_name_what_is_built(image: Image) -> None:
    base = REPO / "deploy/kustomize/base"
    found = [each for path in base.glob("*.yaml") for each in yaml.safe_load_all(path.read_text())]
    workloads = [each for each in found if each["kind"] in ("Deployment", "DaemonSet")]
    images = {c["image"] for each in workloads for c in each["spec"]["template"]["spec"]["containers"]}
    assert images == {f"localhost/meshbridge:{__version__}"}


@pytest.mark.root
def test_the_kernel_takes_its_programs_without_a_compiler_or_a_cache(image: Image) -> None:
    try:
        said = image.run(
            "python", "-c", LOAD.format(pin=PIN), user=0, privileged=True, mounts=["/sys/fs/bpf"], timeout_s=120
        )
        assert (said.returncode, said.stdout.strip()) == (0, "True True"), said.stderr
    finally:
        shutil.rmtree(PIN, ignore_errors=True)

"""A node: containerd, kubelet and kube-proxy on a host."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import topology
import yaml
from control_plane import PROGRAMS
from host import Bind, Host, boot, run
from pki import Authority

SERVICES = ("containerd", "kubelet", "kube-proxy")
SOCKET = "/run/containerd/containerd.sock"
PAUSE = "registry.local/pause:1"
CNI_CONFIGURATION = "/etc/cni/net.d/10-pods.conflist"
STARTED_S = 60

# restrict_oom_score_adj: without it runc ends with "can't get final child's PID from pipe" where the machine does not
# let a process lower its score.
_CONTAINERD = f"""
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true
  sandbox_image = "{PAUSE}"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
"""


def boot_node(name: str, directory: Path, tree: Path, kubernetes: Path, *, lives_on: bool) -> Host:
    """The host, with its CNI plugins; nothing runs on it yet. Its containers' files are on no overlay."""
    for each in ("containerd", "kubelet"):
        (directory / each).mkdir(parents=True, exist_ok=True)
    binds = [
        Bind(kubernetes, PROGRAMS),
        Bind(directory / "containerd", "/var/lib/containerd", "rw"),
        Bind(directory / "kubelet", "/var/lib/kubelet", "rw"),
    ]
    host = boot(name, directory, tree, binds, hosts=topology.hosts_file(), lives_on=lives_on)
    host.write("/etc/containerd/config.toml", _CONTAINERD)
    if not (host.root / "opt/cni/bin").exists():
        shutil.copytree(host.root / "usr/lib/cni", host.root / "opt/cni/bin")
    return host


def start_containerd(host: Host) -> None:
    """Start it; it answers when this returns."""
    host.start("containerd", "/usr/bin/containerd")
    until = time.monotonic() + STARTED_S
    while host.run("ctr", "version", check=False).returncode:
        assert time.monotonic() < until, f"containerd of {host.name} does not start:\n{host.log('containerd')}"
        time.sleep(0.1)


def import_images(host: Host, archive: Path) -> None:
    """Load a Docker or OCI archive into the node's containerd."""
    command = host.argv("ctr", "--namespace", "k8s.io", "images", "import", "-")
    with archive.open("rb") as opened:
        done = subprocess.run(command, stdin=opened, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{host.name} cannot import {archive}: {done.stderr[-2000:]}"


def start_node(host: Host, authority: Authority) -> None:
    """Start the kubelet and kube-proxy of a node whose containerd runs."""
    mine = topology.node(host.name)
    server = f"https://{topology.API_SERVER}:6443"
    authority.issue(host.name, host.name, names=(host.name, mine.address))
    for file in (f"{host.name}.crt", f"{host.name}.key", "ca.crt"):
        host.write(f"/etc/kubernetes/{file}", (authority.directory / file).read_text(), 0o600)
    kubelet = authority.kubeconfig(f"system:node:{host.name}", server, ["system:nodes"])
    host.write("/etc/kubernetes/kubelet.conf", kubelet, 0o600)
    host.write("/etc/kubernetes/kube-proxy.conf", authority.kubeconfig("system:kube-proxy", server), 0o600)
    host.write("/etc/kubernetes/kubelet.yaml", yaml.safe_dump(_kubelet_configuration(host.name)))
    if not (host.root / CNI_CONFIGURATION.lstrip("/")).exists():  # a reboot keeps plugins that were chained in
        host.write(CNI_CONFIGURATION, json.dumps(_network(mine.pods)))
    host.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
    for other in topology.NODES:
        if other != mine:
            run(host.in_network("ip", "route", "replace", other.pods, "via", other.address), where=host.name)
    host.start(
        "kubelet", f"{PROGRAMS}/kubelet", "--config=/etc/kubernetes/kubelet.yaml",
        "--kubeconfig=/etc/kubernetes/kubelet.conf", f"--hostname-override={host.name}", f"--node-ip={mine.address}",
    )  # fmt: skip
    host.start(
        "kube-proxy", f"{PROGRAMS}/kube-proxy", "--kubeconfig=/etc/kubernetes/kube-proxy.conf",
        f"--hostname-override={host.name}", "--proxy-mode=iptables", f"--cluster-cidr={topology.PODS}",
        "--conntrack-max-per-core=0",  # the machine's table is not ours to size
    )  # fmt: skip


def _kubelet_configuration(name: str) -> dict[str, object]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "cgroupDriver": "cgroupfs", "failCgroupV1": False, "failSwapOn": False, "enforceNodeAllocatable": [],
        "authentication": {"anonymous": {"enabled": False}, "webhook": {"enabled": True},
                           "x509": {"clientCAFile": "/etc/kubernetes/ca.crt"}},
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": f"/etc/kubernetes/{name}.crt", "tlsPrivateKeyFile": f"/etc/kubernetes/{name}.key",
        "containerRuntimeEndpoint": f"unix://{SOCKET}", "resolvConf": "/etc/resolv.conf",
        "clusterDNS": [topology.DNS_SERVICE], "clusterDomain": "cluster.local",
        # The disk is the machine's and its fullness not ours to judge; images came by archive and must stay.
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 99,
        "registryPullQPS": 0, "eventRecordQPS": 0, "kubeAPIQPS": 50, "kubeAPIBurst": 100,
    }  # fmt: skip


def _network(pods: str) -> dict[str, object]:
    return {
        "cniVersion": "0.4.0", "name": "pods",
        "plugins": [
            {"type": "ptp", "mtu": 1500, "ipMasq": False, "ipam": {
                "type": "host-local", "ranges": [[{"subnet": pods}]], "routes": [{"dst": "0.0.0.0/0"}]}},
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    }  # fmt: skip

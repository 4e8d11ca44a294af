"""etcd, API server, controller manager and scheduler, on a host of their own that is also the cluster's router."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import topology
from host import Bind, Host, boot, connect, run
from pki import Authority

ETCD = Path("/var/cache/meshbridge/etcd/current/usr/bin/etcd")
PROGRAMS = "/opt/kubernetes"
PKI = "/etc/kubernetes/pki"
STARTED_S = 120
SERVICES = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")


def boot_control_plane(directory: Path, tree: Path, kubernetes: Path, *, lives_on: bool) -> Host:
    """The host, as the hub that nodes are connected to; nothing runs on it yet."""
    binds = [Bind(kubernetes, PROGRAMS), Bind(ETCD, "/usr/local/bin/etcd")]
    host = boot(topology.CONTROL_PLANE, directory, tree, binds, hosts=topology.hosts_file(), lives_on=lives_on)
    for command in (
        ["ip", "link", "add", topology.BRIDGE, "type", "bridge"],
        ["ip", "address", "add", f"{topology.API_SERVER}/{topology.PREFIX}", "dev", topology.BRIDGE],
        ["ip", "link", "set", topology.BRIDGE, "up"],
        ["sysctl", "-qw", "net.ipv4.ip_forward=1"],
        *(["ip", "route", "add", node.pods, "via", node.address] for node in topology.NODES),
    ):
        host.run(*command)
    return host


def plug_in(control_plane: Host, node: Host) -> None:
    """Connect a node to the cluster's network."""
    address = topology.node(node.name).address
    connect(control_plane, topology.BRIDGE, node, f"{address}/{topology.PREFIX}", topology.API_SERVER)


def create_pki(directory: Path) -> Authority:
    authority = Authority.create(directory)
    names = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost", "127.0.0.1")
    authority.issue("apiserver", "kube-apiserver", names=(*names, topology.API_SERVER, topology.API_SERVICE))
    authority.issue("kubelet-client", "kube-apiserver-kubelet-client", groups=("system:masters",))
    return authority


def start_control_plane(host: Host, authority: Authority) -> None:
    """Start all of it; the API server answers when this returns."""
    shutil.copytree(authority.directory, host.root / PKI.lstrip("/"), dirs_exist_ok=True)
    server = f"https://{topology.API_SERVER}:6443"
    for user in ("system:kube-controller-manager", "system:kube-scheduler"):
        host.write(f"/etc/kubernetes/{user.removeprefix('system:')}.conf", authority.kubeconfig(user, server), 0o600)
    host.start(
        "etcd", "/usr/local/bin/etcd", "--data-dir=/var/lib/etcd", "--unsafe-no-fsync",
        "--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
        "--listen-peer-urls=http://127.0.0.1:2380",
    )  # fmt: skip
    host.start(
        "kube-apiserver", f"{PROGRAMS}/kube-apiserver", "--etcd-servers=http://127.0.0.1:2379", "--secure-port=6443",
        f"--advertise-address={topology.API_SERVER}", f"--service-cluster-ip-range={topology.SERVICES}",
        "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true",
        f"--client-ca-file={PKI}/ca.crt", f"--tls-cert-file={PKI}/apiserver.crt",
        f"--tls-private-key-file={PKI}/apiserver.key", f"--kubelet-certificate-authority={PKI}/ca.crt",
        f"--kubelet-client-certificate={PKI}/kubelet-client.crt", f"--kubelet-client-key={PKI}/kubelet-client.key",
        "--kubelet-preferred-address-types=InternalIP", "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={PKI}/sa.key", f"--service-account-signing-key-file={PKI}/sa.key",
        # No kube-proxy here: webhooks are called at their pods.
        "--enable-aggregator-routing=true",
    )  # fmt: skip
    wait_for_api_server(host)
    host.start(
        "kube-controller-manager", f"{PROGRAMS}/kube-controller-manager", "--leader-elect=false",
        "--kubeconfig=/etc/kubernetes/kube-controller-manager.conf", f"--root-ca-file={PKI}/ca.crt",
        f"--service-account-private-key-file={PKI}/sa.key", "--use-service-account-credentials=true",
        f"--cluster-signing-cert-file={PKI}/ca.crt", f"--cluster-signing-key-file={PKI}/ca.key",
    )  # fmt: skip
    host.start(
        "kube-scheduler", f"{PROGRAMS}/kube-scheduler", "--leader-elect=false",
        "--kubeconfig=/etc/kubernetes/kube-scheduler.conf",
    )  # fmt: skip


def wait_for_api_server(host: Host, timeout_s: float = STARTED_S) -> None:
    """Return when the API server says that it is ready."""
    ask = ("curl", "-fs", "--cacert", f"{PKI}/ca.crt", f"https://{topology.API_SERVER}:6443/readyz")
    until = time.monotonic() + timeout_s
    while host.run(*ask, check=False).returncode:
        told = host.log("kube-apiserver")
        assert host.pid_of("kube-apiserver"), f"the API server ended:\n{told}"
        assert time.monotonic() < until, f"the API server is not ready after {timeout_s} s:\n{told}"
        time.sleep(0.1)


def missing() -> str:
    """What is not there yet of what this needs; empty when all is."""
    if not ETCD.exists():
        return "needs etcd: run scripts/setup dev"
    return "" if shutil.which("debootstrap") else "needs debootstrap: run scripts/setup e2e"


def built(name: str) -> Path:
    """Where scripts/third-party built something; fails when it has not."""
    repo = Path(__file__).parent.parent.parent
    try:
        return Path(run([repo / "scripts/third-party", "--path", name], where="third-party").stdout.strip())
    except (AssertionError, subprocess.SubprocessError) as error:
        raise AssertionError(f"{name} is not built: run scripts/third-party {name}") from error

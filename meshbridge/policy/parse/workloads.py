"""Pods, pod templates and the cluster objects around them.

These are read leniently: only what policies and the controller ask for is looked at, and only a wrong type there is
refused. A pod that is refused is no endpoint, so nothing gets through to it.
"""

from __future__ import annotations

import re

from meshbridge.identity.model import ContainerPort, IpAddress, ProxyClass, ProxyContainer, Workload
from meshbridge.policy.mesh import GATEWAY_LABEL
from meshbridge.policy.model import Document, Layer, Refusal
from meshbridge.policy.parse.cluster import EndpointSlice, Namespace, Node, Service, ServiceAccount, ServicePort
from meshbridge.policy.parse.lenient import address as _address
from meshbridge.policy.parse.lenient import child as _child
from meshbridge.policy.parse.lenient import children as _list
from meshbridge.policy.parse.lenient import strings as _strings
from meshbridge.policy.parse.lenient import text as _text
from meshbridge.policy.parse.parsed import ClusterObject, Parsed
from meshbridge.policy.parse.reader import Invalid, Reader, shown

TEMPLATE_KINDS = ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job")

_AMBIENT = "ambient.istio.io/redirection"
_TEMPLATES = "inject.istio.io/templates"
_MANAGED = "gateway.istio.io/managed"
_SERVICE_NAME = "kubernetes.io/service-name"
_PROXY = "istio-proxy"
_INIT = "istio-init"
_LONGEST_NUMBER = 5
_ACCOUNT = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_PROBES = ("livenessProbe", "readinessProbe", "startupProbe")


def parse_cluster_object(document: Document) -> Parsed:
    """One Pod, pod template, Namespace, Node, Service, EndpointSlice or ServiceAccount.

    ``Workload.namespace_labels`` stay empty: who knows the namespaces fills them in.
    """
    try:
        return Parsed(document, objects=(_read(document),))
    except Exception as raised:
        error = Invalid.of(raised)
        refusal = Refusal(document, error.reason, error.path, error.fix, Layer.NETWORK, (), frozenset())
        return Parsed(document, refusals=(refusal,))


def _read(document: Document) -> ClusterObject:
    root = Reader(document.data, "")
    metadata = _child(root, "metadata")
    match document.kind:
        case "Namespace":
            return Namespace(document.name, _strings(metadata, "labels"))
        case "ServiceAccount":
            return ServiceAccount(document.namespace, document.name)
        case "Node":
            addresses = [
                _address(_child(item, "address"))
                for item in _list(_child(root, "status"), "addresses")
                if _text(item, "type") in ("InternalIP", "ExternalIP")
            ]
            return Node(document.name, tuple(addresses), _strings(metadata, "labels"))
        case "Service":
            return _service(document, root)
        case "EndpointSlice":
            return _endpoint_slice(document, root, metadata)
        case "Pod":
            return _workload(document, metadata, _child(root, "spec"), _child(root, "status"))
        case _:
            template = _child(_child(root, "spec"), "template")
            return _workload(document, _child(template, "metadata"), _child(template, "spec"), Reader({}, "status"))


def _workload(document: Document, metadata: Reader, spec: Reader, status: Reader) -> Workload:
    containers = [*_list(spec, "initContainers"), *_list(spec, "containers")]
    by_name = {_text(container, "name"): container for container in containers}
    labels, annotations = _strings(metadata, "labels"), _strings(metadata, "annotations")
    init = by_name.get(_INIT)
    init_args = None
    if init is not None:
        init_args = tuple(item.text() for item in (*_list(init, "command")[1:], *_list(init, "args")))
    init_containers = tuple(_text(container, "name") for container in _list(spec, "initContainers"))
    proxy = _proxy_container(by_name[_PROXY], init_containers) if _PROXY in by_name else None
    return Workload(
        namespace=document.namespace,
        name=document.name,
        uid=document.uid or _text(metadata, "uid"),
        node=_text(spec, "nodeName"),
        addresses=_pod_addresses(status),
        labels=labels,
        annotations=annotations,
        service_account=_service_account(spec),
        ports=tuple(port for container in containers for port in _container_ports(container)),
        probe_ports=tuple(dict.fromkeys(port for container in containers for port in _probe_ports(container))),
        host_network=_child(spec, "hostNetwork").value is True,
        proxy=_proxy(labels, annotations, proxy),
        init_args=init_args,
        phase=_text(status, "phase") or ("Running" if document.kind != "Pod" else "Pending"),
        init_env=_environment(init) if init is not None else {},
        proxy_container=proxy,
        init_containers=init_containers,
    )


def _service_account(spec: Reader) -> str:
    """Its name goes into certificates, where a slash would say another namespace or account."""
    for field in ("serviceAccountName", "serviceAccount"):
        if name := _text(spec, field):
            if not _ACCOUNT.fullmatch(name):
                at = _child(spec, field)
                at.refuse(f"{shown(name)} is no service account", "use lower-case letters, digits, '-' and '.'")
            return name
    return "default"


def _proxy_container(container: Reader, init_containers: tuple[str, ...]) -> ProxyContainer:
    args = [item.text() for item in _list(container, "args")]
    kind = args[1] if len(args) > 1 and args[0] == "proxy" and not args[1].startswith("-") else ""
    security = _child(container, "securityContext")
    uid, gid = _id(security, "runAsUser"), _id(security, "runAsGroup")
    return ProxyContainer(kind, _environment(container), uid, gid, native=_PROXY in init_containers)


def _id(at: Reader, name: str) -> int | None:
    child = _child(at, name)
    return child.integer(0, 2**32 - 1) if child.value is not None else None


def _environment(container: Reader) -> dict[str, str]:
    """The variables with a literal value; one that refers to a Secret or a field is nothing we know."""
    items = _list(container, "env")
    return {_text(item, "name"): _text(item, "value") for item in items if _child(item, "value").value is not None}


def _proxy(labels: dict[str, str], annotations: dict[str, str], proxy: ProxyContainer | None) -> ProxyClass:
    if GATEWAY_LABEL in labels:
        return ProxyClass.WAYPOINT if labels.get(_MANAGED) == "istio.io-mesh-controller" else ProxyClass.GATEWAY
    templates = annotations.get(_TEMPLATES, "").split(",")
    if "grpc-agent" in templates:
        return ProxyClass.PROXYLESS
    if "gateway" in templates or (proxy is not None and proxy.kind == "router"):
        return ProxyClass.GATEWAY
    if proxy is not None:
        return ProxyClass.SIDECAR
    return ProxyClass.AMBIENT if annotations.get(_AMBIENT) == "enabled" else ProxyClass.NONE


def _pod_addresses(status: Reader) -> tuple[IpAddress, ...]:
    found = [_address(_child(item, "ip")) for item in _list(status, "podIPs")]
    single = _child(status, "podIP")
    if single.value:
        found.append(_address(single))
    return tuple(dict.fromkeys(found))


def _container_ports(container: Reader) -> list[ContainerPort]:
    found = []
    for item in _list(container, "ports"):
        number = _child(item, "containerPort").integer(1, 65535)
        found.append(ContainerPort(_text(item, "name"), number, _text(item, "protocol") or "TCP"))
    return found


def _probe_ports(container: Reader) -> list[int | str]:
    found: list[int | str] = []
    for name in _PROBES:
        probe = _child(container, name)
        for action in ("httpGet", "tcpSocket", "grpc"):
            port = _child(_child(probe, action), "port")
            if port.value is not None:
                found.append(_port(port))
    return found


def _port(at: Reader) -> int | str:
    """A port's number, also one in quotes as kubelet takes it, or its name."""
    value = at.value
    if isinstance(value, str) and not value.isdigit():
        return value
    if isinstance(value, str) and value.isascii() and len(value) <= _LONGEST_NUMBER:
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 65536:
        at.refuse(f"{shown(at.value)} is no port", "write a number or a port's name")
    return value


def _service(document: Document, root: Reader) -> Service:
    spec = _child(root, "spec")
    texts = [item for item in _list(spec, "clusterIPs") if item.value not in ("", "None")]
    single = _child(spec, "clusterIP")
    if single.value not in (None, "", "None"):
        texts.append(single)
    ports = []
    for item in _list(spec, "ports"):
        number = _child(item, "port").integer(1, 65535)
        target = _child(item, "targetPort").value
        if target in (None, 0, ""):
            target = number
        if isinstance(target, bool) or not (
            isinstance(target, str) or (isinstance(target, int) and 0 < target < 65536)
        ):
            item.refuse(f"targetPort {shown(target)} is no port", "write a number or a port's name")
        protocol = _text(item, "protocol") or "TCP"
        ports.append(ServicePort(_text(item, "name"), number, target, protocol, _text(item, "appProtocol")))
    selector = _child(spec, "selector")
    external_name = _text(spec, "type") == "ExternalName"
    return Service(
        document.namespace,
        document.name,
        () if external_name else tuple(dict.fromkeys(_address(text) for text in texts)),
        tuple(ports),
        _strings(spec, "selector") if selector.value is not None else None,
        () if external_name else tuple(dict.fromkeys(map(_address, _outside_addresses(root, spec)))),
        _strings(_child(root, "metadata"), "labels"),
        headless="None" in (single.value, *(item.value for item in _list(spec, "clusterIPs"))),
    )


def _endpoint_slice(document: Document, root: Reader, metadata: Reader) -> EndpointSlice:
    """One whose addresses are names has none here."""
    addresses: list[Reader] = []
    if _text(root, "addressType") != "FQDN":
        for endpoint in _list(root, "endpoints"):
            addresses += _list(endpoint, "addresses")
    service = _strings(metadata, "labels").get(_SERVICE_NAME, "")
    return EndpointSlice(document.namespace, service, tuple(dict.fromkeys(map(_address, addresses))))


def _outside_addresses(root: Reader, spec: Reader) -> list[Reader]:
    load_balancer = _child(_child(root, "status"), "loadBalancer")
    ingress = [item for item in _list(load_balancer, "ingress") if _text(item, "ipMode") != "Proxy"]
    by_load_balancer = [ip for item in ingress if (ip := _child(item, "ip")).value not in (None, "")]
    return [*_list(spec, "externalIPs"), *by_load_balancer]

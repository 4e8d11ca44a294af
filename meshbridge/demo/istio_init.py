"""What Istio's init container does to a pod: its arguments, and the nat rules that they become.

Two steps, as in Istio: the injector renders annotations into arguments (`render`), `istio-iptables` reads arguments
(`parse`) and writes rules (`rules`). Nothing in between corrects a value: what the annotations say wrongly, the rules
do wrongly, or iptables refuses.

Spec: istio tools/istio-iptables/pkg/capture/run.go and injection-template.yaml, as of Istio 1.32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_network

from meshbridge.demo.errors import InjectionError
from meshbridge.identity.model import IpFamily

TRAFFIC = "traffic.sidecar.istio.io/"
STATUS_PORT_ANNOTATION = "status.sidecar.istio.io/port"
MODE_ANNOTATION = "sidecar.istio.io/interceptionMode"
HBONE_PORT = "15008"
_LOOPBACK = {IpFamily.IPV4: "127.0.0.1/32", IpFamily.IPV6: "::1/128"}
PASSTHROUGH_IPV6 = "::6/128"
_PASSTHROUGH_SOURCE = {IpFamily.IPV4: "127.0.0.6/32", IpFamily.IPV6: PASSTHROUGH_IPV6}


@dataclass(frozen=True, slots=True)
class InitArguments:
    """What `istio-iptables` was told; a missing -b or -i means none, not every port or range."""

    proxy_port: str = "15001"
    inbound_port: str = "15006"
    proxy_uid: str = "1337"
    proxy_gid: str = "1337"
    mode: str = "REDIRECT"
    include_outbound_ranges: str = ""
    exclude_outbound_ranges: str = ""
    include_inbound_ports: str = ""
    exclude_inbound_ports: str = ""
    include_outbound_ports: str = ""
    exclude_outbound_ports: str = ""
    reroute_interfaces: str = ""
    exclude_interfaces: str = ""


# short flag, long flag → field
_FLAGS = {
    ("-p", "--envoy-port"): "proxy_port",
    ("-z", "--inbound-capture-port"): "inbound_port",
    ("-u", "--proxy-uid"): "proxy_uid",
    ("-g", "--proxy-gid"): "proxy_gid",
    ("-m", "--istio-inbound-interception-mode"): "mode",
    ("-i", "--istio-service-cidr"): "include_outbound_ranges",
    ("-x", "--istio-service-exclude-cidr"): "exclude_outbound_ranges",
    ("-b", "--istio-inbound-ports"): "include_inbound_ports",
    ("-d", "--istio-local-exclude-ports"): "exclude_inbound_ports",
    ("-q", "--istio-outbound-ports"): "include_outbound_ports",
    ("-o", "--istio-local-outbound-ports-exclude"): "exclude_outbound_ports",
    ("-k", "--kube-virt-interfaces"): "reroute_interfaces",
    ("-c", "--istio-exclude-interfaces"): "exclude_interfaces",
}
_FIELD_OF_FLAG = {flag: field for flags, field in _FLAGS.items() for flag in flags}


def render(annotations: Mapping[str, str], pod: str) -> tuple[str, ...]:
    """The arguments of the istio-init container for a pod with these annotations.

    Raises:
        InjectionError: The injector's own validation refuses a value; ``pod`` is then not admitted.
    """
    for name in ("includeInboundPorts", "excludeInboundPorts", "excludeOutboundPorts"):
        value = annotations.get(TRAFFIC + name, "")
        if not (value == "*" and name == "includeInboundPorts"):
            _validate_ports(value, f"pod {pod}, annotation {TRAFFIC}{name}")
    for name in ("includeOutboundIPRanges", "excludeOutboundIPRanges"):
        value = annotations.get(TRAFFIC + name, "")
        if not (value == "*" and name == "includeOutboundIPRanges"):
            _validate_ranges(value, f"pod {pod}, annotation {TRAFFIC}{name}")
    mode = annotations.get(MODE_ANNOTATION, "REDIRECT")
    if mode not in ("REDIRECT", "TPROXY", "NONE"):
        raise InjectionError(
            f"unknown interception mode {mode!r}",
            where=f"pod {pod}, annotation {MODE_ANNOTATION}",
            fix="use REDIRECT, TPROXY or NONE",
        )
    status_port = annotations.get(STATUS_PORT_ANNOTATION, "15020")
    excluded = ["15090", "15021", *([] if status_port in ("", "0") else [status_port])]
    if annotations.get(TRAFFIC + "excludeInboundPorts"):
        excluded.append(annotations[TRAFFIC + "excludeInboundPorts"])
    arguments = ["istio-iptables", "-p", "15001", "-z", "15006", "-u", "1337", "-m", mode]
    arguments += ["-i", annotations.get(TRAFFIC + "includeOutboundIPRanges", "*")]
    arguments += ["-x", annotations.get(TRAFFIC + "excludeOutboundIPRanges", "")]
    arguments += ["-b", annotations.get(TRAFFIC + "includeInboundPorts", "*"), "-d", ",".join(excluded)]
    for flag, name in (("-q", "includeOutboundPorts"), ("-o", "excludeOutboundPorts"), ("-c", "excludeInterfaces")):
        if TRAFFIC + name in annotations:
            arguments += [flag, annotations[TRAFFIC + name]]
    reroute = annotations.get(
        "istio.io/reroute-virtual-interfaces", annotations.get(TRAFFIC + "kubevirtInterfaces", "")
    )
    return (*arguments, *(["-k", reroute] if reroute else []))


def parse(arguments: Sequence[str]) -> InitArguments:
    """Read arguments as ``-b X``, ``-bX``, ``--long X`` or ``--long=X``; of a repeated flag the last wins."""
    parsed = InitArguments()
    words = list(arguments)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if not word.startswith("--"):
            flag, equals, value = word[:2], word[2:], word[2:].removeprefix("=")
        field = _FIELD_OF_FLAG.get(flag)
        if field is None:
            continue  # log levels, dry-run and other flags that decide nothing about capture
        parsed = replace(parsed, **{field: value if equals else words.pop(0) if words else ""})
    return parsed


def rules(arguments: InitArguments, family: IpFamily) -> str:
    """The input for iptables-restore (ip6tables-restore) that Istio's init container would write for REDIRECT.

    ``-m NONE`` as an argument gives the full REDIRECT rules, as Istio's own binary does.

    Raises:
        InjectionError: TPROXY, which this harness does not play.
    """
    if arguments.mode == "TPROXY":
        raise InjectionError("interception mode TPROXY is not played here", fix="use REDIRECT")
    lines = [
        f"-A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports {arguments.proxy_port}",
        f"-A ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports {arguments.inbound_port}",
        *_inbound(arguments),
        *_outbound(arguments, family),
    ]
    chains = ("ISTIO_INBOUND", "ISTIO_REDIRECT", "ISTIO_IN_REDIRECT", "ISTIO_OUTPUT")
    return "\n".join(["*nat", *(f":{chain} - [0:0]" for chain in chains), *lines, "COMMIT", ""])


def _inbound(arguments: InitArguments) -> list[str]:
    interfaces = _items(arguments.exclude_interfaces)
    lines = [f"-A PREROUTING -i {interface} -j RETURN" for interface in interfaces]
    lines += [f"-A OUTPUT -o {interface} -j RETURN" for interface in interfaces]
    for interface in _items(arguments.reroute_interfaces):
        if arguments.include_outbound_ranges == "*":
            lines.append(f"-A PREROUTING -i {interface} -p tcp -j ISTIO_REDIRECT")
        else:
            ranges = _items(arguments.include_outbound_ranges)
            lines += [f"-A PREROUTING -i {interface} -d {cidr} -p tcp -j ISTIO_REDIRECT" for cidr in ranges]
        lines.append(f"-A PREROUTING -i {interface} -j RETURN")
    if not arguments.include_inbound_ports:
        return lines
    lines += ["-A PREROUTING -p tcp -j ISTIO_INBOUND", f"-A ISTIO_INBOUND -p tcp --dport {HBONE_PORT} -j RETURN"]
    if arguments.include_inbound_ports == "*":
        lines += [
            f"-A ISTIO_INBOUND -p tcp --dport {port} -j RETURN" for port in _items(arguments.exclude_inbound_ports)
        ]
        return [*lines, "-A ISTIO_INBOUND -p tcp -j ISTIO_IN_REDIRECT"]
    ports = _items(arguments.include_inbound_ports)
    return lines + [f"-A ISTIO_INBOUND -p tcp --dport {port} -j ISTIO_IN_REDIRECT" for port in ports]


def _outbound(arguments: InitArguments, family: IpFamily) -> list[str]:
    loopback = _LOOPBACK[family]
    lines = ["-A OUTPUT -j ISTIO_OUTPUT"]
    for port in _items(arguments.exclude_outbound_ports):
        lines += [f"-A ISTIO_OUTPUT -p {protocol} --dport {port} -j RETURN" for protocol in ("tcp", "udp")]
    lines.append(f"-A ISTIO_OUTPUT -o lo -s {_PASSTHROUGH_SOURCE[family]} -j RETURN")
    captures_loopback = any(ip_network(cidr).is_loopback for cidr in _ranges(arguments.include_outbound_ranges, family))
    for owner, ids in (("uid", arguments.proxy_uid), ("gid", arguments.proxy_gid)):
        for number in _items(ids):
            own = f"-m owner --{owner}-owner {number}"
            lines.append(
                f"-A ISTIO_OUTPUT -o lo ! -d {loopback} -p tcp ! --dport {HBONE_PORT} {own} -j ISTIO_IN_REDIRECT",
            )
            if not captures_loopback:
                lines.append(f"-A ISTIO_OUTPUT -o lo -m owner ! --{owner}-owner {number} -j RETURN")
            lines.append(f"-A ISTIO_OUTPUT {own} -j RETURN")
    lines.append(f"-A ISTIO_OUTPUT -d {loopback} -j RETURN")
    lines += [f"-A ISTIO_OUTPUT -d {cidr} -j RETURN" for cidr in _ranges(arguments.exclude_outbound_ranges, family)]
    lines += [
        f"-A ISTIO_OUTPUT -p tcp --dport {port} -j ISTIO_REDIRECT" for port in _items(arguments.include_outbound_ports)
    ]
    if arguments.include_outbound_ranges == "*":
        return [*lines, "-A ISTIO_OUTPUT -p tcp -j ISTIO_REDIRECT"]
    ranges = _ranges(arguments.include_outbound_ranges, family)
    return lines + [f"-A ISTIO_OUTPUT -d {cidr} -p tcp -j ISTIO_REDIRECT" for cidr in ranges]


def _items(value: str) -> list[str]:
    return [item for part in value.split(",") if (item := part.strip())]


def _ranges(value: str, family: IpFamily) -> list[str]:
    version = 4 if family is IpFamily.IPV4 else 6
    return [cidr for cidr in _items(value) if cidr != "*" and ip_network(cidr, strict=False).version == version]


def _validate_ports(value: str, where: str) -> None:
    bad: Iterable[str] = (
        item for item in _items(value) if not (item.isascii() and item.isdigit() and int(item) <= 65535)
    )
    for item in bad:
        raise InjectionError(f"{item!r} is not a port", where=where, fix="write ports 0 to 65535, separated by commas")


def _validate_ranges(value: str, where: str) -> None:
    for item in value.split(",") if value else ():
        try:
            if "/" not in item:
                raise ValueError("no prefix length")
            ip_network(item)
        except ValueError as error:
            raise InjectionError(
                f"{item!r} is not a CIDR: {error}",
                where=where,
                fix="write CIDRs without host bits, separated by commas",
            ) from error

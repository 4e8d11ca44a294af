"""What a pod asks for by annotation: who refuses which value, and what is made of the rest.

Two programs read them. The injector validates and renders them into istio-init's arguments (init form) or back into
annotations (CNI form); the CNI plugin then reads the annotations of the final pod, with checks of its own.

Spec: istio pkg/kube/inject/validate.go and template.go, injection-template.yaml, cni/pkg/plugin/sidecar_redirect.go.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from meshbridge.bypass.findings import Finding, FindingCode, Severity, shortened
from meshbridge.bypass.initargs import FALSE, parse_bool
from meshbridge.bypass.redirect_config import RedirectConfig, parse_prefix
from meshbridge.identity.model import ProxyContainer, Workload

TRAFFIC: Final = "traffic.sidecar.istio.io/"
INCLUDE_INBOUND_PORTS: Final = TRAFFIC + "includeInboundPorts"
EXCLUDE_INBOUND_PORTS: Final = TRAFFIC + "excludeInboundPorts"
INCLUDE_OUTBOUND_PORTS: Final = TRAFFIC + "includeOutboundPorts"
EXCLUDE_OUTBOUND_PORTS: Final = TRAFFIC + "excludeOutboundPorts"
INCLUDE_OUTBOUND_RANGES: Final = TRAFFIC + "includeOutboundIPRanges"
EXCLUDE_OUTBOUND_RANGES: Final = TRAFFIC + "excludeOutboundIPRanges"
EXCLUDE_INTERFACES: Final = TRAFFIC + "excludeInterfaces"
KUBEVIRT_INTERFACES: Final = TRAFFIC + "kubevirtInterfaces"
REROUTE_INTERFACES: Final = "istio.io/reroute-virtual-interfaces"
INTERCEPTION_MODE: Final = "sidecar.istio.io/interceptionMode"
STATUS_PORT: Final = "status.sidecar.istio.io/port"
INJECT: Final = "sidecar.istio.io/inject"
STATUS: Final = "sidecar.istio.io/status"
NATIVE_SIDECAR: Final = "sidecar.istio.io/nativeSidecar"
AMBIENT_REDIRECTION: Final = "ambient.istio.io/redirection"
AMBIENT_BYPASS_INBOUND: Final = "ambient.istio.io/bypass-inbound-capture"
AMBIENT_DNS_CAPTURE: Final = "ambient.istio.io/dns-capture"
_TRUE: Final = frozenset({"1", "t", "T", "TRUE", "true", "True"})
DATAPLANE_MODE: Final = "istio.io/dataplane-mode"

ISTIO_PORTS: Final = ("15020", "15021", "15090")

FIELD_OF_ANNOTATION: Final[Mapping[str, str]] = {
    INCLUDE_INBOUND_PORTS: "include_inbound_ports",
    EXCLUDE_INBOUND_PORTS: "exclude_inbound_ports",
    INCLUDE_OUTBOUND_PORTS: "include_outbound_ports",
    EXCLUDE_OUTBOUND_PORTS: "exclude_outbound_ports",
    INCLUDE_OUTBOUND_RANGES: "include_outbound_ranges",
    EXCLUDE_OUTBOUND_RANGES: "exclude_outbound_ranges",
    EXCLUDE_INTERFACES: "exclude_interfaces",
    REROUTE_INTERFACES: "reroute_interfaces",
    KUBEVIRT_INTERFACES: "reroute_interfaces",
    INTERCEPTION_MODE: "mode",
}


@dataclass(frozen=True, slots=True)
class MeshDefaults:
    """The mesh-wide ``global.proxy.*`` values that the injector falls back to, and how redirection is set up.

    ``cni`` False is the istio-init form. ``known`` False: nobody told the values, these are Istio's own defaults.
    """

    include_ip_ranges: str = "*"
    exclude_ip_ranges: str = ""
    include_inbound_ports: str = "*"
    exclude_inbound_ports: str = ""
    include_outbound_ports: str = ""
    exclude_outbound_ports: str = ""
    status_port: str = "15020"
    interception_mode: str = "REDIRECT"
    cni: bool = False
    dns_capture: bool = False
    dual_stack: bool = False
    inject_by_default: bool = True


def is_true(value: str) -> bool:
    """Whether Go's strconv.ParseBool takes a text for true; what it does not take counts as not said."""
    return value in _TRUE


def check_injector(annotations: Mapping[str, str]) -> tuple[Finding, ...]:
    """Every annotation value for which the injector refuses the pod at admission."""
    found = []
    for name, check in _INJECTOR_CHECKS.items():
        if name in annotations and (reason := check(annotations[name])):
            found.append(
                Finding(
                    FindingCode.INJECTOR_REFUSES,
                    Severity.ERROR,
                    f'annotation {name}: "{shortened(annotations[name])}"',
                    reason,
                    _FIXES[check],
                )
            )
    return tuple(found)


def check_cni(annotations: Mapping[str, str]) -> tuple[Finding, ...]:
    """Every annotation value for which the CNI plugin fails, so that the pod never starts."""
    found = []
    for name, check in _CNI_CHECKS.items():
        if name == KUBEVIRT_INTERFACES and REROUTE_INTERFACES in annotations:
            continue  # not looked at
        if name in annotations and (reason := check(annotations[name])):
            subject = f'annotation {name}: "{shortened(annotations[name])}"'
            what = f"{reason}: the CNI plugin fails and the pod never starts"
            found.append(Finding(FindingCode.NEVER_STARTS, Severity.ERROR, subject, what, _FIXES.get(check, "")))
    return tuple(found)


def _ports_reason(text: str) -> str:
    stripped = text.strip()
    if not stripped:
        return ""
    for item in stripped.split(","):
        number = item.strip()
        if not re.fullmatch(r"0*[0-9]{1,5}", number) or int(number[-5:]) > 65535:
            return f"{item!r} is not a port"
    return ""


def _ports_or_all_reason(text: str) -> str:
    return "" if text == "*" else _ports_reason(text)


def _ranges_reason(text: str) -> str:
    for item in text.split(",") if text else ():
        try:
            parse_prefix(item)
        except ValueError:
            return f"{item!r} is not a CIDR"
    return ""


def _ranges_or_all_reason(text: str) -> str:
    return "" if text == "*" else _ranges_reason(text)


def _names_reason(text: str) -> str:
    for item in text.split(",") if text else ():
        if not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9_.\-]{0,14}", item.strip()):
            return f"{item!r} is not an interface name"
    return ""


def _port_reason(text: str) -> str:
    return _ports_reason(text) if text.strip() and "," not in text else f"{text!r} is not a port"


def _mode_reason(text: str) -> str:
    return "" if text in ("REDIRECT", "TPROXY", "NONE") else f"{text!r} is not an interception mode"


def _cni_mode_reason(text: str) -> str:
    return "" if text in ("REDIRECT", "TPROXY") else f"interception mode {text!r} is not one the CNI plugin knows"


_Check = Callable[[str], str]
_INJECTOR_CHECKS: Final[Mapping[str, _Check]] = {
    INCLUDE_INBOUND_PORTS: _ports_or_all_reason,
    EXCLUDE_INBOUND_PORTS: _ports_reason,
    EXCLUDE_OUTBOUND_PORTS: _ports_reason,
    INCLUDE_OUTBOUND_RANGES: _ranges_or_all_reason,
    EXCLUDE_OUTBOUND_RANGES: _ranges_reason,
    EXCLUDE_INTERFACES: _names_reason,
    KUBEVIRT_INTERFACES: _names_reason,
    REROUTE_INTERFACES: _names_reason,
    INTERCEPTION_MODE: _mode_reason,
    STATUS_PORT: _port_reason,
}
_CNI_CHECKS: Final[Mapping[str, _Check]] = {
    INTERCEPTION_MODE: _cni_mode_reason,
    INCLUDE_INBOUND_PORTS: _ports_or_all_reason,
    EXCLUDE_INBOUND_PORTS: _ports_or_all_reason,
    INCLUDE_OUTBOUND_PORTS: _ports_or_all_reason,
    EXCLUDE_OUTBOUND_PORTS: _ports_or_all_reason,
    INCLUDE_OUTBOUND_RANGES: _ranges_or_all_reason,
    EXCLUDE_OUTBOUND_RANGES: _ranges_reason,
    EXCLUDE_INTERFACES: _names_reason,
    REROUTE_INTERFACES: _names_reason,
    KUBEVIRT_INTERFACES: _names_reason,
}
_FIXES: Final[Mapping[_Check, str]] = {
    _ports_reason: "write ports 0 to 65535, separated by commas",
    _ports_or_all_reason: 'write "*" or ports 0 to 65535, separated by commas',
    _ranges_reason: "write CIDRs such as 10.0.0.0/8, separated by commas, without blanks",
    _ranges_or_all_reason: 'write "*" or CIDRs such as 10.0.0.0/8, separated by commas, without blanks',
    _names_reason: "write interface names of at most 15 characters, separated by commas",
    _port_reason: "write one port",
    _mode_reason: "use REDIRECT, TPROXY or NONE",
    _cni_mode_reason: "use REDIRECT or TPROXY",
}


def excluded_with_status_port(status_port: str, excluded: str) -> str:
    """The injector's exclusion list: the status port is appended unless it is empty, 0 or there already."""
    port = status_port.strip()
    if port in ("", "0") or port in excluded.split(","):
        return excluded
    kept = [item.strip() for item in excluded.split(",") if item.strip()]
    return ",".join([*kept, port])


def render_init_args(annotations: Mapping[str, str], mesh: MeshDefaults) -> tuple[str, ...]:
    """The arguments the injector gives istio-init for these annotations; empty in mode NONE, which has none."""
    mode = annotations.get(INTERCEPTION_MODE, mesh.interception_mode)
    if mode == "NONE":
        return ()
    excluded = excluded_with_status_port(
        annotations.get(STATUS_PORT, mesh.status_port),
        annotations.get(EXCLUDE_INBOUND_PORTS, mesh.exclude_inbound_ports),
    )
    arguments = [
        "istio-iptables", "-p", "15001", "-z", "15006", "-u", "1337", "-m", mode,
        "-i", annotations.get(INCLUDE_OUTBOUND_RANGES, mesh.include_ip_ranges),
        "-x", annotations.get(EXCLUDE_OUTBOUND_RANGES, mesh.exclude_ip_ranges),
        "-b", annotations.get(INCLUDE_INBOUND_PORTS, mesh.include_inbound_ports),
        "-d", ",".join(["15090", "15021", *([excluded] if excluded else [])]),
    ]  # fmt: skip
    for flag, name, default in (
        ("-q", INCLUDE_OUTBOUND_PORTS, mesh.include_outbound_ports),
        ("-o", EXCLUDE_OUTBOUND_PORTS, mesh.exclude_outbound_ports),
    ):
        if name in annotations or default:
            arguments += [flag, annotations.get(name, default)]
    if REROUTE_INTERFACES in annotations:
        arguments += ["-k", annotations[REROUTE_INTERFACES]]
    elif KUBEVIRT_INTERFACES in annotations:
        arguments += ["-k", annotations[KUBEVIRT_INTERFACES]]
    if EXCLUDE_INTERFACES in annotations:
        arguments += ["-c", annotations[EXCLUDE_INTERFACES]]
    return tuple(arguments)


def render_cni_annotations(annotations: Mapping[str, str], mesh: MeshDefaults) -> dict[str, str]:
    """The annotations of the final pod in the CNI form: the injector writes its own over the user's.

    An empty mesh-wide range list is lost here (the template leaves it out), so the plugin's default ``*`` applies.
    """
    final = dict(annotations)
    final[INTERCEPTION_MODE] = annotations.get(INTERCEPTION_MODE, mesh.interception_mode)
    for name, default in (
        (INCLUDE_OUTBOUND_RANGES, mesh.include_ip_ranges),
        (EXCLUDE_OUTBOUND_RANGES, mesh.exclude_ip_ranges),
    ):
        if value := annotations.get(name, default):
            final[name] = value
    final[INCLUDE_INBOUND_PORTS] = annotations.get(INCLUDE_INBOUND_PORTS, mesh.include_inbound_ports)
    final[EXCLUDE_INBOUND_PORTS] = excluded_with_status_port(
        annotations.get(STATUS_PORT, mesh.status_port),
        annotations.get(EXCLUDE_INBOUND_PORTS, mesh.exclude_inbound_ports),
    )
    for name, default in (
        (INCLUDE_OUTBOUND_PORTS, mesh.include_outbound_ports),
        (EXCLUDE_OUTBOUND_PORTS, mesh.exclude_outbound_ports),
    ):
        if name in annotations or default:
            final[name] = annotations.get(name, default)
    final.setdefault(STATUS, "{}")
    return final


def cni_config(annotations: Mapping[str, str], proxy: ProxyContainer | None) -> RedirectConfig:
    """What the CNI plugin makes of the final pod's annotations; check_cni has to be asked first."""
    defaults = {
        "mode": "REDIRECT",
        "include_inbound_ports": "*",
        "exclude_inbound_ports": "15020",
        "exclude_outbound_ports": "15020",
        "include_outbound_ranges": "*",
    }
    values = dict(defaults)
    sources = dict.fromkeys(defaults, "the CNI plugin's default")
    for annotation, name in FIELD_OF_ANNOTATION.items():
        if annotation == KUBEVIRT_INTERFACES and REROUTE_INTERFACES in annotations:
            continue
        if annotation in annotations:
            values[name] = annotations[annotation]
            sources[name] = f'annotation {annotation}: "{shortened(annotations[annotation])}"'
    own = values["exclude_inbound_ports"].strip().removesuffix(",")
    values["exclude_inbound_ports"] = ",".join(dict.fromkeys([*(own.split(",") if own else []), *ISTIO_PORTS]))
    env = proxy.env if proxy else {}
    dns = parse_bool(env.get("ISTIO_META_DNS_CAPTURE", "")) is True
    return replace(
        RedirectConfig(**values),  # type: ignore[arg-type]  # every value is a string field
        proxy_uid=str(proxy.uid) if proxy and proxy.uid else "1337",
        proxy_gid=str(proxy.gid) if proxy and proxy.gid else "1337",
        redirect_dns=dns,
        capture_all_dns=dns,
        dual_stack=parse_bool(env.get("ISTIO_DUAL_STACK", "")) is True,
        drop_invalid=parse_bool(env.get("INVALID_DROP", "")) is True,
        sources=sources,
    )


def cni_skips(workload: Workload) -> str:
    """Why the CNI plugin leaves a pod without rules; empty when it does not."""
    proxy = workload.proxy_container
    if proxy is None:
        return "the pod has no istio-proxy container"
    if parse_bool(proxy.env.get("DISABLE_ENVOY", "")):
        return "DISABLE_ENVOY is set on istio-proxy"
    if proxy.kind not in ("", "sidecar"):
        return f"the proxy type is {proxy.kind!r}, not sidecar"
    choice, where = _injection_choice(workload)
    if choice in FALSE:
        return f'{where} {INJECT} is "{choice}"'
    if STATUS not in workload.annotations:
        return f"annotation {STATUS} is missing"
    return ""


def injection_refused(workload: Workload, mesh: MeshDefaults) -> str:
    """Why the injector adds no sidecar to a pod; empty when it adds one.

    Only ``true`` and ``false`` count; the label beats the annotation; the namespace's and the pod's revision labels
    decide which webhook is asked, which a manifest alone does not tell.
    """
    if workload.host_network:
        return "hostNetwork pods are never injected"
    choice, where = _injection_choice(workload)
    if choice == "false":
        return f'{where} {INJECT} is "false"'
    labels = workload.namespace_labels
    asked = labels.get("istio-injection") == "enabled" or (
        "istio.io/rev" in labels and labels.get("istio-injection") != "disabled"
    )
    if labels.get("istio-injection") == "disabled" and choice != "true":
        return 'namespace label istio-injection is "disabled"'
    if asked:
        return "" if choice == "true" or mesh.inject_by_default else "injection is off by default"
    if choice == "true" or "istio.io/rev" in workload.labels:
        return (
            ""
            if where != "annotation"
            else f"the namespace is not labelled, and only a label {INJECT} would ask for it"
        )
    return "neither the namespace nor the pod asks for a sidecar"


def _injection_choice(workload: Workload) -> tuple[str, str]:
    if INJECT in workload.labels:
        return workload.labels[INJECT], "label"
    return workload.annotations.get(INJECT, ""), "annotation"

"""Values that mean something else than they look: each numbered surprise of redirection, said before anybody meets it.

Spec: ISTIO.md §c, "Measured".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice

from meshbridge.bypass.annotations import EXCLUDE_INBOUND_PORTS, EXCLUDE_OUTBOUND_PORTS, ISTIO_PORTS
from meshbridge.bypass.findings import Finding, FindingCode, Severity, shortened
from meshbridge.bypass.redirect_config import RedirectConfig, has_loopback, items
from meshbridge.bypass.rules import SERVICE_PORTS, port_range
from meshbridge.bypass.sets import IntSet, union
from meshbridge.identity.model import Workload

MAX_FINDINGS = 16
_PORT_FIELDS = ("exclude_inbound_ports", "include_inbound_ports", "exclude_outbound_ports", "include_outbound_ports")


def value_findings(workload: Workload, config: RedirectConfig, *, cni: bool) -> list[Finding]:
    """Everything worth saying about settings that istio-iptables accepts."""
    found = [finding for name in _PORT_FIELDS for finding in islice(_port_findings(config, name), MAX_FINDINGS)]
    found += _inbound_findings(workload, config)
    found += _outbound_findings(workload, config, cni)
    if workload.init_containers and not cni:
        found += _init_container_findings(workload)
    if config.mode == "NONE":
        what = "istio-iptables does not know mode NONE and writes the full REDIRECT rules"
        found.append(Finding(FindingCode.MODE_NONE_IN_ARGUMENTS, Severity.WARNING, config.source("mode"), what))
    return found


def _port_findings(config: RedirectConfig, name: str) -> Iterable[Finding]:
    text = getattr(config, name)
    if text == "*" or (name == "exclude_inbound_ports" and config.include_inbound_ports != "*"):
        return
    for item in items(text):
        word = item.strip()
        subject = config.source(name) or name
        try:
            meant = port_range(word)
        except ValueError:
            continue  # the pod never starts, which is said elsewhere
        if ":" in word:
            what = f"{word!r} is the range of ports {meant}; annotations for other lists refuse ranges"
            yield Finding(FindingCode.PORT_RANGE, Severity.WARNING, subject, what)
        elif re.match(r"0[0-9xX]", word):
            fix = f"write {word.lstrip('0') or '0'} if you meant that, {meant} if you meant what it does"
            yield Finding(
                FindingCode.OCTAL_PORT, Severity.WARNING, subject, f"{word!r} is port {meant} to iptables", fix
            )
        elif word in SERVICE_PORTS:
            what = f"{word!r} is looked up in the container; usually port {meant}"
            yield Finding(FindingCode.SERVICE_NAME, Severity.WARNING, subject, what, f"write {meant}")


def _ports(text: str) -> IntSet:
    found = []
    for item in items(text):
        try:
            found.append(port_range(item.strip()))
        except ValueError:
            continue
    return union(found)


def _inbound_findings(workload: Workload, config: RedirectConfig) -> Iterable[Finding]:
    subject = config.source("exclude_inbound_ports") or "excludeInboundPorts"
    own = IntSet.of(*(int(port) for port in ISTIO_PORTS))
    excluded = _ports(config.exclude_inbound_ports)
    if config.include_inbound_ports != "*":
        included = _ports(config.include_inbound_ports)
        if excluded - own:
            listed = shortened(config.include_inbound_ports)
            what = f"is ignored: the list {listed!r} alone decides, all else bypasses Envoy"
            fix = "remove one of the two"
            yield Finding(FindingCode.EXCLUDE_IGNORED, Severity.WARNING, subject, what, fix)
        captured, where = included & own, config.source("include_inbound_ports") or "includeInboundPorts"
    else:
        captured, where = own - excluded, subject
    if captured:
        what = f"ports {captured} of the sidecar itself are redirected too"
        fix = f"exclude ports {own}, and leave status.sidecar.istio.io/port alone"
        yield Finding(FindingCode.CAPTURES_ISTIO_PORT, Severity.WARNING, where, what, fix)
    declared = IntSet.of(*(port.port for port in workload.ports))
    probes = IntSet.of(*(port for port in workload.probe_ports if isinstance(port, int)))
    named = EXCLUDE_INBOUND_PORTS in workload.annotations or excluded - own
    unknown = excluded - own - declared - probes
    if config.include_inbound_ports == "*" and named and unknown and declared:
        what = f"excludes ports {shortened(str(unknown))}, which no container declares"
        yield Finding(FindingCode.UNKNOWN_PORT, Severity.WARNING, subject, what, f"declared are {declared}")


def _outbound_findings(workload: Workload, config: RedirectConfig, cni: bool) -> Iterable[Finding]:
    given = workload.annotations.get(EXCLUDE_OUTBOUND_PORTS)
    if cni and given is not None and 15020 not in _ports(config.exclude_outbound_ports):
        what = "the CNI plugin's default exclusion of port 15020 is gone, because the annotation is there at all"
        yield Finding(FindingCode.DEFAULT_EXCLUSION_LOST, Severity.INFO, f"annotation {EXCLUDE_OUTBOUND_PORTS}", what)
    try:
        loopback = has_loopback(config.include_outbound_ranges)
    except ValueError:
        loopback = False
    if loopback:
        what = (
            "names a loopback range, so the application's calls to its own pod address go to Envoy, port 15008 included"
        )
        yield Finding(FindingCode.LOOPBACK_CAPTURED, Severity.WARNING, config.source("include_outbound_ranges"), what)
    if items(config.reroute_interfaces) and (
        config.exclude_outbound_ports or config.exclude_outbound_ranges or config.exclude_interfaces
    ):
        what = "traffic from rerouted interfaces goes to Envoy whatever is excluded outbound"
        yield Finding(FindingCode.REROUTE_IGNORES, Severity.WARNING, config.source("reroute_interfaces"), what)


def _init_container_findings(workload: Workload) -> Iterable[Finding]:
    names = workload.init_containers
    before = names[: names.index("istio-init")] if "istio-init" in names else ()
    if before:
        what = f"init containers {', '.join(before)} run before istio-init, so their traffic is not captured"
        yield Finding(FindingCode.INIT_CONTAINERS, Severity.INFO, f"pod {workload.key}", what)

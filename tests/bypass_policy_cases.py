"""Specifications of a BypassPolicy that are refused, with what the refusal says, and some that are taken."""

from __future__ import annotations

REFUSED = {
    "unknown field": ("{acept: [l7]}", "spec.acept: unknown field 'acept'"),
    "unknown loss": ("{accept: [everything], reason: r}", "spec.accept[0]: unknown value 'everything'"),
    "unknown mode": ("{mode: off}", "spec.mode"),
    "unknown mending": ("{fix: now}", "spec.fix: unknown value 'now'"),
    "a port of many digits": (f"{{routes: [{{direction: inbound, ports: ['{'9' * 5000}']}}]}}", "is no port"),
    "until before all time": (
        "{accept: [l7], reason: r, until: '0001-01-01T00:00:00+14:00'}",
        "spec.until: '0001-01-01T00:00:00+14:00' is no time",
    ),
    "no reason": ("{accept: [l7]}", "spec.reason: a loss is accepted without a reason"),
    "until without accept": ("{until: '2027-01-01T00:00:00Z'}", "spec.until: ends the acceptance of losses"),
    "until is no time": ("{accept: [l7], reason: r, until: soon}", "spec.until: 'soon' is no time"),
    "until without zone": ("{accept: [l7], reason: r, until: '2027-01-01T00:00:00'}", "has no time zone"),
    "route without direction": ("{routes: [{ports: [1]}]}", "spec.routes[0]: has no direction"),
    "port 0": ("{routes: [{direction: inbound, ports: [0]}]}", "spec.routes[0].ports[0]: 0 is out of range"),
    "backward range": ('{routes: [{direction: inbound, ports: ["9-8"]}]}', "'9-8' is no port and no range"),
    "no number": ('{routes: [{direction: inbound, ports: ["http"]}]}', "'http' is no port and no range"),
    "empty ports": ("{routes: [{direction: inbound, ports: []}]}", "spec.routes[0].ports: the list is empty"),
    "inbound destinations": ("{routes: [{direction: inbound, destinations: [10.0.0.0/8]}]}", "belongs to outbound"),
    "no network": ("{routes: [{direction: outbound, destinations: [x]}]}", "'x' is no CIDR"),
    "unknown kind": ("{routes: [{direction: inbound, kinds: [magic]}]}", "unknown value 'magic'"),
    "a gate without a proof": ("{readinessGate: true}", "spec.readinessGate: waits for a proof"),
    "a condition of nothing": (
        "{requireNodeEncryption: true, accept: [l7], reason: r}",
        "spec.requireNodeEncryption: is a condition of accepting lost encryption",
    ),
    "requireNodeEncryption is no text": ("{requireNodeEncryption: 'yes'}", "spec.requireNodeEncryption"),
    "namespaceSelector": ("{namespaceSelector: {}}", "spec.namespaceSelector: unknown field"),
    "no mapping": ("[]", "spec: expected a mapping"),
}

BEYOND_A_SCHEMA = frozenset({"until before all time", "backward range", "no network", "no mapping"})
"""Those of REFUSED that an API server takes all the same, or refuses before it looks at the specification."""

TAKEN = {
    "nothing written": "{}",
    "everything written": (
        "{selector: {matchLabels: {app: api}, matchExpressions: [{key: tier, operator: In, values: [a, b]}]}, "
        'mode: audit, routes: [{direction: outbound, kinds: [excludeOutboundPorts], ports: [443, "8000-8999"], '
        'destinations: [10.0.0.0/8, "fd00::/8"]}, {direction: inbound}], accept: [encryption, l7], '
        'until: "2027-06-30T00:00:00Z", reason: r, otherwise: deny, fix: apply, proof: true, readinessGate: true, '
        "requireNodeEncryption: true}"
    ),
    "no route": "{routes: []}",
    "no acceptance": "{accept: []}",
}

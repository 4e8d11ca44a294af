"""Who refuses which annotation value, and what the injector and the CNI plugin make of the others (ISTIO.md §c)."""

from __future__ import annotations

import pytest

from meshbridge.bypass import annotations as a
from meshbridge.bypass.annotations import MeshDefaults
from meshbridge.identity.model import ProxyContainer, Workload

REFUSED_BY_INJECTOR = {
    "a word for a port": {a.EXCLUDE_INBOUND_PORTS: "http"},
    "a range of ports": {a.EXCLUDE_INBOUND_PORTS: "80-90"},
    "an empty item": {a.EXCLUDE_INBOUND_PORTS: "80,,90"},
    "a comma at the end": {a.EXCLUDE_OUTBOUND_PORTS: "80,"},
    "a port over 65535": {a.INCLUDE_INBOUND_PORTS: "65536"},
    "a negative port": {a.EXCLUDE_OUTBOUND_PORTS: "-1"},
    "a hexadecimal port": {a.EXCLUDE_INBOUND_PORTS: "0x50"},
    "a star in an exclude list": {a.EXCLUDE_INBOUND_PORTS: "*"},
    "a star in an outbound exclude list": {a.EXCLUDE_OUTBOUND_PORTS: "*"},
    "a star among ports": {a.INCLUDE_INBOUND_PORTS: "*,80"},
    "a bare address for a range": {a.EXCLUDE_OUTBOUND_RANGES: "10.0.0.1"},
    "a blank after a comma of ranges": {a.INCLUDE_OUTBOUND_RANGES: "10.0.0.0/8, 11.0.0.0/8"},
    "a netmask for a length": {a.INCLUDE_OUTBOUND_RANGES: "10.0.0.0/255.0.0.0"},
    "a length with a leading zero": {a.EXCLUDE_OUTBOUND_RANGES: "10.0.0.0/08"},
    "a length that is too long": {a.EXCLUDE_OUTBOUND_RANGES: "10.0.0.0/33"},
    "a star in an exclude list of ranges": {a.EXCLUDE_OUTBOUND_RANGES: "*"},
    "an interface name of 16 characters": {a.EXCLUDE_INTERFACES: "abcdefghijklmnop"},
    "an interface name with a plus": {a.REROUTE_INTERFACES: "eth+"},
    "an interface name that starts with a digit": {a.KUBEVIRT_INTERFACES: "0eth"},
    "an unknown mode": {a.INTERCEPTION_MODE: "redirect"},
    "two status ports": {a.STATUS_PORT: "15020,15021"},
    "no status port at all": {a.STATUS_PORT: ""},
    "digits that are not ASCII": {a.EXCLUDE_INBOUND_PORTS: "８０８０"},
}


@pytest.mark.parametrize("annotations", REFUSED_BY_INJECTOR.values(), ids=REFUSED_BY_INJECTOR.keys())
def test_injector_refuses(annotations: dict[str, str]) -> None:
    (finding,) = a.check_injector(annotations)
    assert next(iter(annotations)) in finding.subject
    assert finding.fix


TAKEN_BY_INJECTOR = {
    "blanks around ports": {a.EXCLUDE_INBOUND_PORTS: " 8080 , 9090 "},
    "an empty list": {a.EXCLUDE_INBOUND_PORTS: "", a.INCLUDE_INBOUND_PORTS: "", a.INCLUDE_OUTBOUND_RANGES: ""},
    "a leading zero, which is octal later": {a.EXCLUDE_INBOUND_PORTS: "0120"},
    "a leading zero that no octal number has": {a.EXCLUDE_INBOUND_PORTS: "090"},
    "anything in includeOutboundPorts": {a.INCLUDE_OUTBOUND_PORTS: "*,x,80-90"},
    "host bits in a range": {a.EXCLUDE_OUTBOUND_RANGES: "10.1.2.3/8"},
    "mode NONE": {a.INTERCEPTION_MODE: "NONE"},
    "port 0": {a.EXCLUDE_INBOUND_PORTS: "0"},
}


@pytest.mark.parametrize("annotations", TAKEN_BY_INJECTOR.values(), ids=TAKEN_BY_INJECTOR.keys())
def test_injector_takes(annotations: dict[str, str]) -> None:
    assert a.check_injector(annotations) == ()


CNI = {
    "a star in an exclude list passes the plugin": ({a.EXCLUDE_INBOUND_PORTS: "*"}, True),
    "mode NONE fails the plugin": ({a.INTERCEPTION_MODE: "NONE"}, False),
    "a service name in includeOutboundPorts fails it": ({a.INCLUDE_OUTBOUND_PORTS: "http"}, False),
    "a range in includeOutboundPorts fails it": ({a.INCLUDE_OUTBOUND_PORTS: "443-445"}, False),
    "a star in includeOutboundPorts passes its own check": ({a.INCLUDE_OUTBOUND_PORTS: "*"}, True),
    "bad kubevirt names do not matter beside the new name": (
        {a.KUBEVIRT_INTERFACES: "0bad", a.REROUTE_INTERFACES: "tap0"},
        True,
    ),
}


@pytest.mark.parametrize(("annotations", "passes"), CNI.values(), ids=CNI.keys())
def test_cni_checks(annotations: dict[str, str], passes: bool) -> None:
    assert (a.check_cni(annotations) == ()) == passes


def flag(arguments: tuple[str, ...], name: str) -> str | None:
    return arguments[arguments.index(name) + 1] if name in arguments else None


STATUS_PORTS = {
    "the default is appended": ({}, "15090,15021,15020"),
    "after the user's ports": ({a.EXCLUDE_INBOUND_PORTS: "80"}, "15090,15021,80,15020"),
    "another port replaces it": ({a.STATUS_PORT: "9999"}, "15090,15021,9999"),
    "0 leaves it out": ({a.STATUS_PORT: "0"}, "15090,15021"),
    "it is not said twice": ({a.EXCLUDE_INBOUND_PORTS: "15020,80"}, "15090,15021,15020,80"),
}


@pytest.mark.parametrize(("annotations", "excluded"), STATUS_PORTS.values(), ids=STATUS_PORTS.keys())
def test_status_port_in_the_exclusion_list(annotations: dict[str, str], excluded: str) -> None:
    assert flag(a.render_init_args(annotations, MeshDefaults()), "-d") == excluded


def test_annotation_beats_the_mesh_wide_value() -> None:
    mesh = MeshDefaults(exclude_outbound_ports="3306", include_ip_ranges="10.0.0.0/8")
    assert flag(a.render_init_args({}, mesh), "-o") == "3306"
    assert flag(a.render_init_args({a.EXCLUDE_OUTBOUND_PORTS: ""}, mesh), "-o") == ""
    assert flag(a.render_init_args({a.INCLUDE_OUTBOUND_RANGES: ""}, mesh), "-i") == ""


def test_mode_none_has_no_istio_init() -> None:
    assert a.render_init_args({a.INTERCEPTION_MODE: "NONE"}, MeshDefaults()) == ()


def test_an_empty_mesh_wide_range_is_lost_on_the_way_to_the_cni_plugin() -> None:
    mesh = MeshDefaults(include_ip_ranges="")
    assert flag(a.render_init_args({}, mesh), "-i") == ""
    assert a.cni_config(a.render_cni_annotations({}, mesh), None).include_outbound_ranges == "*"


def test_the_users_own_empty_range_reaches_the_cni_plugin() -> None:
    final = a.render_cni_annotations({a.INCLUDE_OUTBOUND_RANGES: ""}, MeshDefaults())
    assert a.cni_config(final, None).include_outbound_ranges == ""


def test_cni_always_adds_istios_three_ports_inbound_and_15020_outbound_by_default() -> None:
    config = a.cni_config({a.EXCLUDE_INBOUND_PORTS: "80"}, None)
    assert config.exclude_inbound_ports == "80,15020,15021,15090"
    assert config.exclude_outbound_ports == "15020"
    assert a.cni_config({a.EXCLUDE_OUTBOUND_PORTS: ""}, None).exclude_outbound_ports == ""


def test_cni_takes_owners_from_the_proxys_security_context_and_zero_is_1337() -> None:
    config = a.cni_config({}, ProxyContainer(uid=2000, gid=0))
    assert (config.uids, config.gids) == (["2000"], ["1337"])


def test_the_new_name_of_reroute_interfaces_wins() -> None:
    given = {a.KUBEVIRT_INTERFACES: "old0", a.REROUTE_INTERFACES: "new0"}
    assert a.cni_config(given, None).reroute_interfaces == "new0"
    assert flag(a.render_init_args(given, MeshDefaults()), "-k") == "new0"


def pod(**changes: object) -> Workload:
    base: dict[str, object] = {
        "annotations": {a.STATUS: "{}"},
        "proxy_container": ProxyContainer(kind="sidecar"),
    }
    return Workload("shop", "web", "u", "n", (), **{**base, **changes})  # type: ignore[arg-type]


CNI_SKIPS = {
    "nothing, for an injected pod": ({}, False),
    "no status annotation": ({"annotations": {}}, True),
    "the inject label F": ({"labels": {a.INJECT: "F"}}, True),
    "not the inject label no": ({"labels": {a.INJECT: "no"}}, False),
    "the inject annotation false": ({"annotations": {a.STATUS: "{}", a.INJECT: "false"}}, True),
    "not when the label says true": (
        {"annotations": {a.STATUS: "{}", a.INJECT: "false"}, "labels": {a.INJECT: "true"}},
        False,
    ),
    "DISABLE_ENVOY": ({"proxy_container": ProxyContainer(env={"DISABLE_ENVOY": "1"})}, True),
    "another proxy type": ({"proxy_container": ProxyContainer(kind="router")}, True),
    "no istio-proxy container": ({"proxy_container": None}, True),
}


@pytest.mark.parametrize(("changes", "skips"), CNI_SKIPS.values(), ids=CNI_SKIPS.keys())
def test_cni_plugin_passes_over(changes: dict[str, object], skips: bool) -> None:
    assert bool(a.cni_skips(pod(**changes))) == skips


INJECTION = {
    "a labelled namespace injects": ({"namespace_labels": {"istio-injection": "enabled"}}, True),
    "a revision does too": ({"namespace_labels": {"istio.io/rev": "canary"}}, True),
    "no label, no sidecar": ({}, False),
    "the pod's label asks for it": ({"labels": {a.INJECT: "true"}}, True),
    "the pod's annotation alone does not reach the webhook": ({"annotations": {a.INJECT: "true"}}, False),
    "the pod's label opts out": (
        {"namespace_labels": {"istio-injection": "enabled"}, "labels": {a.INJECT: "false"}},
        False,
    ),
    "no is neither true nor false": (
        {"namespace_labels": {"istio-injection": "enabled"}, "labels": {a.INJECT: "no"}},
        True,
    ),
    "hostNetwork is never injected": (
        {"namespace_labels": {"istio-injection": "enabled"}, "host_network": True},
        False,
    ),
    "a disabled namespace is not": ({"namespace_labels": {"istio-injection": "disabled"}}, False),
}


@pytest.mark.parametrize(("changes", "injected"), INJECTION.values(), ids=INJECTION.keys())
def test_injection_decision(changes: dict[str, object], injected: bool) -> None:
    workload = pod(**{"annotations": {}, "proxy_container": None, **changes})
    assert (a.injection_refused(workload, MeshDefaults()) == "") == injected

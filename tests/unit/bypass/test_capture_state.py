"""The capture state of a pod: each numbered surprise of ISTIO.md §c, the truth order, and what contradicts what."""

from __future__ import annotations

from dataclasses import dataclass, field
from ipaddress import ip_address

import pytest

from meshbridge.bypass import annotations as a
from meshbridge.bypass.annotations import MeshDefaults
from meshbridge.bypass.capture import capture_state
from meshbridge.bypass.findings import FindingCode
from meshbridge.bypass.initargs import parse_init_args
from meshbridge.bypass.iptables import parse_iptables_save
from meshbridge.bypass.redirect_config import restore_text
from meshbridge.bypass.rules import SeenRules
from meshbridge.bypass.state import CaptureState, RouteKind, Span, Truth
from meshbridge.identity.model import ContainerPort, IpFamily, ProxyClass, ProxyContainer, Workload
from meshbridge.policy.capture import PortClass
from meshbridge.policy.model import Direction

V4, V6 = IpFamily.IPV4, IpFamily.IPV6
CAPTURED, EXCLUDED = PortClass.CAPTURED, PortClass.EXCLUDED
UNGUARDED, TUNNEL = PortClass.UNGUARDED, PortClass.TUNNEL
POD_IP = "10.0.0.1"


@dataclass(frozen=True)
class Out:
    """A flow the pod opens."""

    destination: str = "10.1.1.1"
    port: int = 80
    protocol: int = 6
    output: str = "eth0"
    uid: int = 1000
    gid: int = 1000
    source: str = POD_IP


def init_pod(
    annotations: dict[str, str] | None = None,
    *,
    mesh: MeshDefaults | None = None,
    arguments: tuple[str, ...] | None = None,
    addresses: tuple[str, ...] = (POD_IP,),
    **changes: object,
) -> Workload:
    """A pod after injection in the init form; its arguments are those the injector renders unless given."""
    given = annotations or {}
    rendered = a.render_init_args(given, mesh or MeshDefaults())
    base: dict[str, object] = {
        "addresses": tuple(ip_address(address) for address in addresses),
        "annotations": {**given, a.STATUS: "{}"},
        "init_args": arguments if arguments is not None else rendered or None,
        "init_containers": ("istio-init",) if arguments is not None or rendered else (),
        "proxy": ProxyClass.SIDECAR,
        "proxy_container": ProxyContainer(kind="sidecar", uid=1337, gid=1337),
        "ports": (ContainerPort("http", 8080),),
    }
    return Workload("shop", "web", "u", "n", **{**base, **changes})  # type: ignore[arg-type]


def cni_pod(annotations: dict[str, str] | None = None, *, mesh: MeshDefaults | None = None) -> Workload:
    """A pod after injection in the CNI form: the injector wrote its annotations over the user's."""
    final = a.render_cni_annotations(annotations or {}, mesh or MeshDefaults(cni=True))
    return Workload(
        "shop",
        "web",
        "u",
        "n",
        (ip_address(POD_IP),),
        annotations=final,
        proxy=ProxyClass.SIDECAR,
        proxy_container=ProxyContainer(kind="sidecar", uid=1337, gid=1337),
        init_containers=("istio-validation",),
        ports=(ContainerPort("http", 8080),),
    )


def inbound(state: CaptureState, port: int, family: IpFamily = V4, interface: str = "eth0") -> PortClass:
    return state.inbound(interface, intended=True)[family].at(port)


def outbound(state: CaptureState, flow: Out) -> Span:
    """The one span that holds a flow; there is never more than one, and never none."""
    address = ip_address(flow.destination)
    found = [
        span
        for span in state.of(Direction.EGRESS, IpFamily.of(address), intended=True)
        if int(address) in span.box.destination
        and int(ip_address(flow.source)) in span.box.source
        and flow.port in span.box.port
        and flow.protocol in span.box.protocol
        and flow.output in span.box.output
        and flow.uid in span.box.uid
        and flow.gid in span.box.gid
    ]
    assert len(found) == 1
    return found[0]


def codes(state: CaptureState) -> set[FindingCode]:
    return {finding.code for finding in state.findings}


@dataclass(frozen=True)
class Case:
    """Annotations (and mesh values), and the class of inbound ports that follow."""

    annotations: dict[str, str]
    expected: dict[int, PortClass]
    finding: FindingCode | None = None
    mesh: MeshDefaults = field(default_factory=MeshDefaults)


INBOUND = {
    "nothing asked: everything but Istio's own ports": Case(
        {}, {80: CAPTURED, 15006: CAPTURED, 15008: TUNNEL, 15020: UNGUARDED, 15021: UNGUARDED, 15090: UNGUARDED}
    ),
    "an excluded port": Case({a.EXCLUDE_INBOUND_PORTS: "8080"}, {8080: EXCLUDED, 8081: CAPTURED}),
    "blanks in the list": Case(
        {a.EXCLUDE_INBOUND_PORTS: " 80 , 8080"}, {80: EXCLUDED, 8080: EXCLUDED, 81: CAPTURED}, FindingCode.UNKNOWN_PORT
    ),
    "an include list: everything else bypasses": Case(
        {a.INCLUDE_INBOUND_PORTS: "8080"}, {8080: CAPTURED, 80: EXCLUDED, 15008: TUNNEL, 15021: UNGUARDED}
    ),
    "an include list ignores excludes": Case(
        {a.INCLUDE_INBOUND_PORTS: "8080,9090", a.EXCLUDE_INBOUND_PORTS: "9090"},
        {8080: CAPTURED, 9090: CAPTURED, 80: EXCLUDED},
        FindingCode.EXCLUDE_IGNORED,
    ),
    "an empty include list: nothing is captured": Case({a.INCLUDE_INBOUND_PORTS: ""}, {80: EXCLUDED, 15008: TUNNEL}),
    "mode NONE": Case({a.INTERCEPTION_MODE: "NONE"}, {80: EXCLUDED, 15021: UNGUARDED}, FindingCode.NO_REDIRECTION),
    "mode TPROXY excludes the same ports": Case(
        {a.INTERCEPTION_MODE: "TPROXY", a.EXCLUDE_INBOUND_PORTS: "8080"}, {8080: EXCLUDED, 80: CAPTURED}
    ),
    "surprise 2: a leading zero is octal": Case(
        {a.EXCLUDE_INBOUND_PORTS: "0120"}, {80: EXCLUDED, 120: CAPTURED}, FindingCode.OCTAL_PORT
    ),
    "surprise 3: another status port leaves 15020 captured": Case(
        {a.STATUS_PORT: "9999"},
        {15020: CAPTURED, 9999: EXCLUDED, 15021: UNGUARDED},
        FindingCode.CAPTURES_ISTIO_PORT,
    ),
    "surprise 3: status port 0 does too": Case(
        {a.STATUS_PORT: "0"}, {15020: CAPTURED, 15021: UNGUARDED}, FindingCode.CAPTURES_ISTIO_PORT
    ),
    "surprise 3: an include list that names them captures them": Case(
        {a.INCLUDE_INBOUND_PORTS: "80,15021"}, {15021: CAPTURED, 15020: UNGUARDED}, FindingCode.CAPTURES_ISTIO_PORT
    ),
    "a mesh-wide exclusion without any annotation": Case(
        {}, {9100: EXCLUDED, 80: CAPTURED}, FindingCode.MESH_WIDE, MeshDefaults(exclude_inbound_ports="9100")
    ),
    "a port nobody declares": Case(
        {a.EXCLUDE_INBOUND_PORTS: "8081"}, {8081: EXCLUDED, 8080: CAPTURED}, FindingCode.UNKNOWN_PORT
    ),
}


@pytest.mark.parametrize("case", INBOUND.values(), ids=INBOUND.keys())
def test_inbound_class_follows_from_annotations(case: Case) -> None:
    state = capture_state(init_pod(case.annotations, mesh=case.mesh))
    assert state.starts
    assert {port: inbound(state, port) for port in case.expected} == case.expected
    if case.finding:
        assert case.finding in codes(state)
    else:
        assert not codes(state) - {FindingCode.RULES_NOT_SEEN}


CNI_INBOUND = {
    "an excluded port": Case({a.EXCLUDE_INBOUND_PORTS: "8080"}, {8080: EXCLUDED, 80: CAPTURED, 15020: UNGUARDED}),
    "surprise 3: the CNI form always excludes Istio's three": Case(
        {a.STATUS_PORT: "9999"}, {15020: UNGUARDED, 9999: EXCLUDED}
    ),
}


@pytest.mark.parametrize("case", CNI_INBOUND.values(), ids=CNI_INBOUND.keys())
def test_inbound_class_in_the_cni_form(case: Case) -> None:
    state = capture_state(cni_pod(case.annotations))
    assert state.truth is Truth.ANNOTATIONS
    assert {port: inbound(state, port) for port in case.expected} == case.expected


def test_arguments_without_an_exclusion_list_capture_15021_and_15090() -> None:
    state = capture_state(init_pod(arguments=("istio-iptables", "-b", "*", "-i", "*")))
    assert inbound(state, 15021) is inbound(state, 15090) is CAPTURED
    assert FindingCode.CAPTURES_ISTIO_PORT in codes(state)


def test_surprise_1_tproxy_takes_the_tunnel_port_too() -> None:
    state = capture_state(init_pod({a.INTERCEPTION_MODE: "TPROXY"}))
    assert inbound(state, 15008) is TUNNEL
    tunnels = [span for span in state.of(Direction.INGRESS, V4, intended=True) if 15008 in span.box.port]
    assert [span.listener for span in tunnels if 6 in span.box.protocol] == [15006]
    plain = [
        span
        for span in capture_state(init_pod()).of(Direction.INGRESS, V4, intended=True)
        if 15008 in span.box.port and 6 in span.box.protocol
    ]
    assert [span.listener for span in plain] == [0]


NEVER_STARTS = {
    "surprise 2: 090 is no octal number": {a.EXCLUDE_INBOUND_PORTS: "090"},
    "surprise 2: 08080 is none either": {a.EXCLUDE_OUTBOUND_PORTS: "08080"},
    "surprise 6: a range with a dash": {a.INCLUDE_OUTBOUND_PORTS: "443-445"},
    "surprise 6: a star": {a.INCLUDE_OUTBOUND_PORTS: "*"},
}


@pytest.mark.parametrize("annotations", NEVER_STARTS.values(), ids=NEVER_STARTS.keys())
@pytest.mark.parametrize("make", [init_pod, cni_pod], ids=["init form", "CNI form"])
def test_pods_that_never_start(make: object, annotations: dict[str, str]) -> None:
    state = capture_state(make(annotations))  # type: ignore[operator]
    assert not state.starts
    assert FindingCode.NEVER_STARTS in codes(state)


def test_surprise_4_mode_none_in_the_cni_form_never_starts() -> None:
    assert not capture_state(cni_pod({a.INTERCEPTION_MODE: "NONE"})).starts


def test_surprise_4_mode_none_in_the_arguments_is_full_redirection() -> None:
    state = capture_state(init_pod(arguments=("-m", "NONE", "-b", "*", "-i", "*", "-d", "15090,15021,15020")))
    assert inbound(state, 80) is CAPTURED
    assert FindingCode.MODE_NONE_IN_ARGUMENTS in codes(state)


def test_surprise_5_an_empty_mesh_wide_range_differs_between_the_forms() -> None:
    mesh = MeshDefaults(include_ip_ranges="")
    assert outbound(capture_state(init_pod(mesh=mesh)), Out()).port_class is EXCLUDED
    assert outbound(capture_state(cni_pod(mesh=mesh)), Out()).port_class is CAPTURED
    own = {a.INCLUDE_OUTBOUND_RANGES: ""}
    assert outbound(capture_state(init_pod(own)), Out()).port_class is EXCLUDED
    assert outbound(capture_state(cni_pod(own)), Out()).port_class is EXCLUDED


def test_surprise_6_the_init_form_takes_service_names_and_ranges_with_a_colon() -> None:
    state = capture_state(init_pod({a.INCLUDE_OUTBOUND_PORTS: "https,3000:9090", a.INCLUDE_OUTBOUND_RANGES: ""}))
    assert state.starts
    classes = {port: outbound(state, Out(port=port)).port_class for port in (443, 3000, 8080, 9090, 9091)}
    assert classes == {443: CAPTURED, 3000: CAPTURED, 8080: CAPTURED, 9090: CAPTURED, 9091: EXCLUDED}
    assert {FindingCode.SERVICE_NAME, FindingCode.PORT_RANGE} <= codes(state)


def test_surprise_7_the_default_outbound_exclusion_of_15020_disappears_with_the_annotation() -> None:
    assert outbound(capture_state(cni_pod()), Out(port=15020)).port_class is EXCLUDED
    state = capture_state(cni_pod({a.EXCLUDE_OUTBOUND_PORTS: ""}))
    assert outbound(state, Out(port=15020)).port_class is CAPTURED
    assert FindingCode.DEFAULT_EXCLUSION_LOST in codes(state)


OWN_ADDRESS = Out(destination=POD_IP, output="lo", uid=1337, gid=1337)

OUTBOUND = {
    "everything is captured": ({}, Out(), CAPTURED, 15001),
    "Envoy's own is not": ({}, Out(uid=1337), UNGUARDED, 0),
    "nor what its group sends": ({}, Out(gid=1337), UNGUARDED, 0),
    "UDP never is": ({}, Out(protocol=17), UNGUARDED, 0),
    "an excluded port": ({a.EXCLUDE_OUTBOUND_PORTS: "80"}, Out(), EXCLUDED, 0),
    "an excluded port does not concern others": ({a.EXCLUDE_OUTBOUND_PORTS: "80"}, Out(port=81), CAPTURED, 15001),
    "an excluded range": ({a.EXCLUDE_OUTBOUND_RANGES: "10.1.0.0/16"}, Out(), EXCLUDED, 0),
    "host bits in the range do not matter": ({a.EXCLUDE_OUTBOUND_RANGES: "10.1.9.9/16"}, Out(), EXCLUDED, 0),
    "outside of the excluded range": ({a.EXCLUDE_OUTBOUND_RANGES: "10.2.0.0/16"}, Out(), CAPTURED, 15001),
    "an included range": ({a.INCLUDE_OUTBOUND_RANGES: "10.1.0.0/16"}, Out(), CAPTURED, 15001),
    "outside of the included range": ({a.INCLUDE_OUTBOUND_RANGES: "10.2.0.0/16"}, Out(), EXCLUDED, 0),
    "an included port, whatever the range": (
        {a.INCLUDE_OUTBOUND_RANGES: "", a.INCLUDE_OUTBOUND_PORTS: "80"},
        Out(),
        CAPTURED,
        15001,
    ),
    "exclusion of a range comes before inclusion of a port": (
        {a.EXCLUDE_OUTBOUND_RANGES: "10.1.0.0/16", a.INCLUDE_OUTBOUND_PORTS: "80"},
        Out(),
        EXCLUDED,
        0,
    ),
    "an excluded interface": ({a.EXCLUDE_INTERFACES: "eth0"}, Out(), EXCLUDED, 0),
    "surprise 10: Envoy to its own pod address goes to its inbound listener": ({}, OWN_ADDRESS, CAPTURED, 15006),
    "surprise 10: but not on the tunnel port": ({}, Out(POD_IP, 15008, 6, "lo", 1337, 1337), UNGUARDED, 0),
    "surprise 8: nor on an excluded port": ({a.EXCLUDE_OUTBOUND_PORTS: "80"}, OWN_ADDRESS, UNGUARDED, 0),
    "surprise 8: excluding lo does it for every port": ({a.EXCLUDE_INTERFACES: "lo"}, OWN_ADDRESS, UNGUARDED, 0),
    "the application to its own pod address": ({}, Out(POD_IP, output="lo"), UNGUARDED, 0),
    "surprise 9: with a loopback range it is captured": (
        {a.INCLUDE_OUTBOUND_RANGES: "127.0.0.0/8,10.0.0.0/8"},
        Out(POD_IP, output="lo"),
        CAPTURED,
        15001,
    ),
    "surprise 9: on the tunnel port too": (
        {a.INCLUDE_OUTBOUND_RANGES: "127.0.0.0/8,10.0.0.0/8"},
        Out(POD_IP, 15008, output="lo"),
        CAPTURED,
        15001,
    ),
}


@pytest.mark.parametrize(("annotations", "flow", "port_class", "listener"), OUTBOUND.values(), ids=OUTBOUND.keys())
def test_outbound_class_follows_from_annotations(
    annotations: dict[str, str], flow: Out, port_class: PortClass, listener: int
) -> None:
    span = outbound(capture_state(init_pod(annotations)), flow)
    assert (span.port_class, span.listener) == (port_class, listener)


def test_surprise_11_dns_capture_in_the_cni_form_takes_all_udp_53() -> None:
    final = a.render_cni_annotations({}, MeshDefaults(cni=True))
    proxy = ProxyContainer(kind="sidecar", env={"ISTIO_META_DNS_CAPTURE": "true"})
    workload = Workload(
        "shop", "web", "u", "n", (ip_address(POD_IP),), annotations=final, proxy=ProxyClass.SIDECAR,
        proxy_container=proxy, init_containers=("istio-validation",),
    )  # fmt: skip
    state = capture_state(workload)
    assert outbound(state, Out(port=53, protocol=17)).listener == 15053
    assert outbound(state, Out(port=53, protocol=17)).port_class is UNGUARDED
    assert outbound(state, Out(port=54, protocol=17)).listener == 0


def test_surprise_12_exclusions_do_not_concern_rerouted_interfaces() -> None:
    state = capture_state(init_pod({a.REROUTE_INTERFACES: "tap0", a.EXCLUDE_INTERFACES: "tap0"}))
    assert inbound(state, 80, interface="eth0") is CAPTURED
    rerouted = [
        span
        for span in state.of(Direction.INGRESS, V4, intended=True)
        if "tap0" in span.box.input and 80 in span.box.port and 6 in span.box.protocol
    ]
    assert [span.listener for span in rerouted] == [15001]
    assert FindingCode.REROUTE_IGNORES in codes(state)


def test_surprise_15_without_dual_stack_all_ipv6_bypasses() -> None:
    both = (POD_IP, "fd00::1")
    state = capture_state(init_pod(addresses=both))
    assert (inbound(state, 80, V4), inbound(state, 80, V6)) == (CAPTURED, EXCLUDED)
    assert FindingCode.IPV6_BYPASSES in codes(state)
    (span,) = [s for s in state.outbound_bypasses(V6, intended=True) if 80 in s.box.port]
    assert span.route.kind is RouteKind.IPV6
    dual = capture_state(init_pod(addresses=both, init_env={"ISTIO_DUAL_STACK": "true"}))
    assert inbound(dual, 80, V6) is CAPTURED
    only_v6 = capture_state(init_pod(addresses=("fd00::1",)))
    assert inbound(only_v6, 80, V6) is CAPTURED


def test_environment_of_istio_init_counts() -> None:
    state = capture_state(init_pod(arguments=("-b", "*", "-i", "*"), init_env={"ISTIO_LOCAL_EXCLUDE_PORTS": "8080"}))
    assert inbound(state, 8080) is EXCLUDED


def test_the_excluded_interface_lets_inbound_pass_only_there() -> None:
    state = capture_state(init_pod({a.EXCLUDE_INTERFACES: "net1"}))
    assert (inbound(state, 80, interface="eth0"), inbound(state, 80, interface="net1")) == (CAPTURED, EXCLUDED)


def test_what_bypasses_envoy_on_one_of_several_interfaces_counts_for_all_that_are_not_told_apart() -> None:
    one = capture_state(init_pod({a.EXCLUDE_INTERFACES: "net1", a.EXCLUDE_INBOUND_PORTS: "9090"}))
    ports = {port: one.inbound(None)[V4].at(port) for port in (80, 9090, 15008)}
    assert ports == {80: EXCLUDED, 9090: EXCLUDED, 15008: PortClass.TUNNEL}
    captured = capture_state(init_pod())
    assert captured.inbound(None) == captured.inbound()


def test_owner_groups_let_processes_out() -> None:
    arguments = a.render_init_args({}, MeshDefaults())
    state = capture_state(init_pod(arguments=arguments, init_env={"ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE": "2000"}))
    assert outbound(state, Out(gid=2000)).route.kind is RouteKind.OWNER_GROUPS
    assert outbound(state, Out(gid=2000)).port_class is EXCLUDED
    assert outbound(state, Out()).port_class is CAPTURED


# The truth order


def seen(text: str, family: IpFamily = V4) -> SeenRules:
    return SeenRules((parse_iptables_save(text, family),))


def rules_of(workload: Workload) -> SeenRules:
    assert workload.init_args is not None
    config, _ = parse_init_args(workload.init_args, workload.init_env)
    return seen(restore_text(config, V4))


def test_before_the_rules_are_seen_every_port_is_excluded() -> None:
    state = capture_state(init_pod())
    assert state.inbound()[V4].at(80) is EXCLUDED
    assert state.inbound()[V4].at(15021) is UNGUARDED
    assert {s.route.kind for s in state.outbound_bypasses(V4)} == {RouteKind.RULES_NOT_SEEN}
    assert FindingCode.RULES_NOT_SEEN in codes(state)


def test_once_the_rules_are_seen_they_decide() -> None:
    workload = init_pod({a.EXCLUDE_INBOUND_PORTS: "8080"})
    state = capture_state(workload, seen=rules_of(workload))
    assert state.truth is Truth.RULES
    assert (state.inbound()[V4].at(80), state.inbound()[V4].at(8080)) == (CAPTURED, EXCLUDED)
    assert not codes(state)


def test_a_seen_exclusion_keeps_the_name_of_what_asked_for_it() -> None:
    workload = init_pod({a.EXCLUDE_INBOUND_PORTS: "8080"})
    state = capture_state(workload, seen=rules_of(workload))
    (span,) = [s for s in state.of(Direction.INGRESS, V4) if s.port_class is EXCLUDED]
    assert span.route.kind is RouteKind.EXCLUDE_INBOUND_PORTS
    assert '-d "15090,15021,8080,15020"' in span.route.detail


def test_arguments_beat_annotations_and_the_contradiction_is_named() -> None:
    arguments = a.render_init_args({a.EXCLUDE_INBOUND_PORTS: "8080"}, MeshDefaults())
    state = capture_state(init_pod({a.EXCLUDE_INBOUND_PORTS: "9090"}, arguments=arguments))
    assert (inbound(state, 8080), inbound(state, 9090)) == (EXCLUDED, CAPTURED)
    (finding,) = [f for f in state.findings if f.code is FindingCode.ARGUMENTS_CONTRADICT]
    assert "9090" in str(finding)
    assert "8080" in str(finding)
    assert "followed istio-init" in str(finding)


def test_rules_beat_arguments_and_the_contradiction_is_named() -> None:
    state = capture_state(
        init_pod({a.EXCLUDE_INBOUND_PORTS: "9090"}), seen=rules_of(init_pod({a.EXCLUDE_INBOUND_PORTS: "8080"}))
    )
    assert (state.inbound()[V4].at(8080), state.inbound()[V4].at(9090)) == (EXCLUDED, CAPTURED)
    assert {FindingCode.RULES_MISSING, FindingCode.RULES_CONTRADICT} <= codes(state)
    assert any("ports 8080" in f.subject for f in state.findings if f.code is FindingCode.RULES_MISSING)


def test_rules_that_vanished_exclude_everything_and_say_so() -> None:
    state = capture_state(init_pod(), seen=SeenRules())
    assert state.inbound()[V4].at(80) is EXCLUDED
    assert FindingCode.RULES_MISSING in codes(state)


def test_rules_that_could_not_be_read_capture_nothing_and_say_so() -> None:
    state = capture_state(init_pod(), seen=SeenRules(problems=("iptables-save: timed out",)))
    assert state.inbound()[V4].at(80) is EXCLUDED
    assert FindingCode.RULE_NOT_UNDERSTOOD in codes(state)


ODD_RULES = {
    "an unknown match before the redirect": (
        "*nat\n:PREROUTING ACCEPT\n-A PREROUTING -p tcp --dport 80 -m time --timestart 08:00 -j RETURN\n"
        "-A PREROUTING -p tcp -j REDIRECT --to-ports 15006\nCOMMIT",
        {80: EXCLUDED, 81: CAPTURED},
    ),
    "an unknown target": (
        "*nat\n:PREROUTING ACCEPT\n-A PREROUTING -p tcp --dport 80 -j STRANGE --x 1\n"
        "-A PREROUTING -p tcp -j REDIRECT --to-ports 15006\nCOMMIT",
        {80: EXCLUDED, 81: CAPTURED},
    ),
    "a redirect to somebody else": (
        "*nat\n:PREROUTING ACCEPT\n-A PREROUTING -p tcp --dport 80 -j REDIRECT --to-ports 9999\n"
        "-A PREROUTING -p tcp -j REDIRECT --to-ports 15006\nCOMMIT",
        {80: EXCLUDED, 81: CAPTURED},
    ),
    "a redirect for one source only": (
        "*nat\n:PREROUTING ACCEPT\n-A PREROUTING -s 10.9.0.0/16 -p tcp --dport 80 -j RETURN\n"
        "-A PREROUTING -p tcp -j REDIRECT --to-ports 15006\nCOMMIT",
        {80: EXCLUDED, 81: CAPTURED},
    ),
    "untracked packets know no nat": (
        "*raw\n:PREROUTING ACCEPT\n-A PREROUTING -p tcp --dport 80 -j CT --notrack\nCOMMIT\n"
        "*nat\n:PREROUTING ACCEPT\n-A PREROUTING -p tcp -j REDIRECT --to-ports 15006\nCOMMIT",
        {80: EXCLUDED, 81: CAPTURED},
    ),
    "an accept in another table does not end it": (
        "*mangle\n:PREROUTING ACCEPT\n-A PREROUTING -p tcp --dport 80 -j ACCEPT\nCOMMIT\n"
        "*nat\n:PREROUTING ACCEPT\n-A PREROUTING -p tcp -j REDIRECT --to-ports 15006\nCOMMIT",
        {80: CAPTURED, 81: CAPTURED},
    ),
    "an unterminated quote": (
        '*nat\n:PREROUTING ACCEPT\n-A PREROUTING -p tcp -m comment --comment "x -j REDIRECT --to-ports 15006\nCOMMIT',
        {80: EXCLUDED},
    ),
    "chains that call each other": (
        "*nat\n:PREROUTING ACCEPT\n:A -\n:B -\n-A PREROUTING -j A\n-A A -j B\n-A B -j A\nCOMMIT",
        {80: EXCLUDED},
    ),
    "a line that is no rule": (
        "*nat\n:PREROUTING ACCEPT\nhello\n-A PREROUTING -p tcp -j REDIRECT --to-ports 15006",
        {80: EXCLUDED},
    ),
    "more text than rules have": ("#" * (1 << 20) + "#", {80: EXCLUDED}),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), ODD_RULES.values(), ids=ODD_RULES.keys())
def test_odd_rules_are_never_taken_for_capture(text: str, expected: dict[int, PortClass]) -> None:
    state = capture_state(init_pod(), seen=seen(text))
    assert {port: state.inbound()[V4].at(port) for port in expected} == expected


def test_two_backends_that_disagree_count_as_not_understood() -> None:
    to = "*nat\n:PREROUTING ACCEPT\n-A PREROUTING -p tcp -j REDIRECT --to-ports {}\nCOMMIT"
    both = SeenRules(
        (parse_iptables_save(to.format(15006), V4, "legacy"), parse_iptables_save(to.format(9999), V4, "nft"))
    )
    assert capture_state(init_pod(), seen=both).inbound()[V4].at(80) is EXCLUDED
    one = SeenRules((parse_iptables_save("", V4, "legacy"), parse_iptables_save(to.format(15006), V4, "nft")))
    assert capture_state(init_pod(), seen=one).inbound()[V4].at(80) is CAPTURED


# Pods without redirection


NO_REDIRECTION = {
    "no sidecar asked for": Workload("shop", "web", "u", "n", ()),
    "host network": Workload("shop", "web", "u", "n", (), host_network=True),
    "a gateway": Workload("shop", "gw", "u", "n", (), proxy=ProxyClass.GATEWAY),
}


@pytest.mark.parametrize("workload", NO_REDIRECTION.values(), ids=NO_REDIRECTION.keys())
def test_pods_that_nothing_guards(workload: Workload) -> None:
    state = capture_state(workload)
    assert state.truth is Truth.NO_PROXY
    assert {part.port_class for part in state.inbound()[V4].ranges} == {UNGUARDED}
    assert state.outbound_bypasses(V4) == ()


def test_a_sidecar_without_istio_init_bypasses_everything() -> None:
    state = capture_state(init_pod(init_args=None, init_containers=()))
    assert inbound(state, 80) is EXCLUDED
    assert FindingCode.NO_REDIRECTION in codes(state)


def test_a_pod_as_written_is_judged_by_what_the_injector_will_make_of_it() -> None:
    written = Workload(
        "shop", "web", "u", "n", (), annotations={a.EXCLUDE_INBOUND_PORTS: "8080"},
        namespace_labels={"istio-injection": "enabled"}, ports=(ContainerPort("http", 8080),),
    )  # fmt: skip
    state = capture_state(written)
    assert state.truth is Truth.PREDICTED
    assert (inbound(state, 8080), inbound(state, 80)) == (EXCLUDED, CAPTURED)
    refused = capture_state(
        Workload("shop", "web", "u", "n", (), annotations={a.EXCLUDE_INBOUND_PORTS: "http"}, proxy=ProxyClass.SIDECAR)
    )
    assert not refused.starts
    assert FindingCode.INJECTOR_REFUSES in codes(refused)


def test_sidecar_annotations_have_no_effect_in_ambient() -> None:
    workload = Workload(
        "shop", "web", "u", "n", (), annotations={a.EXCLUDE_INBOUND_PORTS: "80"}, proxy=ProxyClass.AMBIENT
    )
    state = capture_state(workload)
    assert inbound(state, 80) is CAPTURED
    assert FindingCode.AMBIENT_IGNORES in codes(state)
    bypassing = Workload(
        "shop", "web", "u", "n", (), annotations={a.AMBIENT_BYPASS_INBOUND: "true"}, proxy=ProxyClass.AMBIENT
    )
    assert inbound(capture_state(bypassing), 80) is EXCLUDED


def test_init_containers_before_istio_init_are_named() -> None:
    state = capture_state(init_pod(init_containers=("migrate", "istio-init")))
    (finding,) = [f for f in state.findings if f.code is FindingCode.INIT_CONTAINERS]
    assert "migrate" in finding.what

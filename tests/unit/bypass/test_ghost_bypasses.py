"""What bypasses Envoy although the pod's specification does not ask for it."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address

import pytest

from meshbridge.bypass import annotations as a
from meshbridge.bypass.annotations import MeshDefaults
from meshbridge.bypass.capture import capture_state
from meshbridge.bypass.ghosts import ghost_bypasses
from meshbridge.bypass.initargs import parse_init_args
from meshbridge.bypass.iptables import parse_iptables_save
from meshbridge.bypass.redirect_config import restore_text
from meshbridge.bypass.rules import SeenRules
from meshbridge.identity.model import IpFamily, ProxyClass, Workload


def workload(**annotations: str) -> Workload:
    given = {a.TRAFFIC + key: value for key, value in annotations.items()}
    return Workload(
        "shop", "api", "u", "n", (ip_address("10.0.0.1"), ip_address("fd00::1")), annotations=given,
        proxy=ProxyClass.SIDECAR, init_env={"ISTIO_DUAL_STACK": "true"},
        init_args=a.render_init_args(given, MeshDefaults()),
    )  # fmt: skip


def rules(pod: Workload, change: Callable[[str, IpFamily], str] = lambda text, _: text) -> SeenRules:
    config, _ = parse_init_args(pod.init_args or (), pod.init_env)
    texts = ((family, change(restore_text(config, family), family)) for family in IpFamily)
    return SeenRules(tuple(parse_iptables_save(text, family) for family, text in texts))


def ghosts(pod: Workload, seen: SeenRules | None) -> list[tuple[str, str, str]]:
    """Direction, family and ports of each."""
    found = ghost_bypasses(capture_state(pod, seen=seen))
    return [(ghost.direction.name, ghost.family.name, str(ghost.ports)) for ghost in found]


def exempting_9000(text: str, family: IpFamily) -> str:
    rule = "-A PREROUTING -p tcp --dport 9000 -j RETURN\n"
    return text.replace("-A PREROUTING", f"{rule}-A PREROUTING", 1) if family is IpFamily.IPV4 else text


PLAIN, EXCLUDING = workload(), workload(excludeInboundPorts="9000", excludeOutboundPorts="53")
ALL_BUT_ISTIOS = "0-15007,15009-15019,15022-15089,15091-65535"
CASES: dict[str, tuple[Workload, SeenRules | None, list[tuple[str, str, str]]]] = {
    "none where rules are as asked for": (EXCLUDING, rules(EXCLUDING), []),
    "none while nothing was read": (EXCLUDING, None, []),
    "none of a pod without a sidecar": (Workload("shop", "api", "u", "n", ()), SeenRules(), []),
    "a port that somebody's rule takes out": (PLAIN, rules(PLAIN, exempting_9000), [("INGRESS", "IPV4", "9000")]),
    "none of a port that was to be excluded anyway": (EXCLUDING, rules(EXCLUDING, exempting_9000), []),
    "another pod's rules": (
        PLAIN, rules(EXCLUDING),
        [("INGRESS", f, "9000") for f in ("IPV4", "IPV6")] + [("EGRESS", f, "53") for f in ("IPV4", "IPV6")],
    ),
    "no rules at all": (
        PLAIN, SeenRules(),
        [("INGRESS", f, ALL_BUT_ISTIOS) for f in ("IPV4", "IPV6")]
        + [("EGRESS", f, "0-65535") for f in ("IPV4", "IPV6")],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("pod", "seen", "expected"), CASES.values(), ids=CASES.keys())
def test_a_ghost_bypass_is(pod: Workload, seen: SeenRules | None, expected: list[tuple[str, str, str]]) -> None:
    assert ghosts(pod, seen) == expected


def test_it_names_its_ports_and_its_route() -> None:
    (ghost,) = ghost_bypasses(capture_state(PLAIN, seen=rules(PLAIN, exempting_9000)))
    assert str(ghost).startswith("inbound IPv4 TCP 9000 bypasses Envoy, and nobody asked for it: a rule in the pod's")

"""Why packets were dropped: the number the kernel reports, the names people search for, and a way forward."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DropReason:
    """One value of ``enum drop_reason``.

    ``name`` is what JSON carries (Hubble's drop_reason_desc where Cilium has the reason), ``text`` what lines print.
    """

    number: int
    name: str
    text: str
    meaning: str
    fix: str


_REASONS = (
    DropReason(
        132, "INVALID_SOURCE_IP", "Invalid source ip",
        "the pod sent from an address that is not its own",
        "if the pod rightly uses that address, list it in its annotation meshbridge.io/extra-addresses",
    ),
    DropReason(
        133, "POLICY_DENIED", "Policy denied",
        "policies isolate the pod in this direction and none of their rules allows this peer and port",
        "allow the peer and port in one of the policies named here, or in a new one",
    ),
    DropReason(
        134, "INVALID_PACKET_DROPPED", "Invalid packet",
        "a header is cut short or contradicts itself",
        "look for a broken sender or a middlebox that rewrites packets",
    ),
    DropReason(
        142, "UNKNOWN_L4_PROTOCOL", "Unknown L4 protocol",
        "the transport protocol is not one that policy can judge",
        "use TCP, UDP, SCTP or ICMP between pods",
    ),
    DropReason(
        150, "UNKNOWN_L3_TARGET", "Unknown L3 target address",
        "the packet was routed to this pod's interface, and its destination is no address of the pod",
        "see why the node routes the address here; a further address of the pod belongs in its status.podIPs",
    ),
    DropReason(
        157, "IP_FRAGMENTATION_NOT_SUPPORTED", "IP fragmentation not supported",
        "the table of fragments could not be read or written",
        "avoid fragments (path MTU, smaller datagrams)",
    ),
    DropReason(
        166, "UNSUPPORTED_L2_PROTOCOL", "Unsupported L2 protocol",
        "the frame is neither IP nor ARP, so no policy can judge it",
        "pods may only speak IPv4, IPv6, ARP and neighbour discovery",
    ),
    DropReason(
        175, "FIRST_LOGICAL_DATAGRAM_FRAGMENT_NOT_FOUND", "First logical datagram fragment not found",
        "a later fragment came without its first one, which carries the ports",
        "avoid fragments (path MTU, smaller datagrams)",
    ),
    DropReason(
        176, "FORBIDDEN_ICMPV6_MESSAGE", "Forbidden ICMPv6 message",
        "the pod sent a router advertisement, or neighbour discovery for an address that is not its own",
        "if the pod rightly uses that address, list it in its annotation meshbridge.io/extra-addresses",
    ),
    DropReason(
        181, "POLICY_DENY", "Policy denied by denylist",
        "a deny rule matches this peer and port; a deny beats every allow of its tier",
        "narrow or remove the deny rule named here",
    ),
    DropReason(
        182, "VLAN_FILTERED", "VLAN traffic disallowed by VLAN filter",
        "the frame carries a VLAN tag, behind which policy does not look",
        "send untagged frames",
    ),
    DropReason(
        203, "DROP_EP_NOT_READY", "Endpoint policy program not available",
        "the pod is hooked, but its policy is not known or could not be compiled, so everything is dropped",
        "see 'meshbridge endpoint list' and 'meshbridge status' for what it waits for",
    ),
    DropReason(
        220, "MESH_POLICY", "Mesh policy denied",
        "an ALLOW AuthorizationPolicy selects the pod and no rule of any could allow this connection",
        "allow the peer in one of the policies named here",
    ),
    DropReason(
        221, "MESH_POLICY_DENY", "Mesh policy denied by denylist",
        "a DENY AuthorizationPolicy matches this connection whatever is sent on it",
        "narrow or remove the rule named here",
    ),
    DropReason(
        222, "NO_L7_JUDGE", "No L7 judge",
        "the policy needs to see the request, and no Envoy judges requests on this port",
        "give the pod a sidecar on this port, or write the rule in terms of peers and ports",
    ),
    DropReason(
        223, "SERVICE_BACKENDS_DIFFER", "Service backends differ",
        "policy allows some backends of the service and denies others, and this hook cannot tell which is meant",
        "make the egress policy cover all backends of the service",
    ),
    DropReason(
        224, "ICMP_ERROR_UNRELATED", "ICMP error unrelated",
        "an ICMP error quotes a packet of no open flow of this pod",
        "nothing, unless path MTU discovery fails: then look where the flow's state was lost",
    ),
    DropReason(
        225, "FRAGMENT_TINY", "Fragment too short",
        "the first fragment is too short to carry its ports",
        "find the sender: no ordinary stack makes such fragments",
    ),
    DropReason(
        226, "FRAGMENT_OVERLAP", "Fragment overlaps transport header",
        "a later fragment reaches back into the transport header of the first",
        "find the sender: no ordinary stack makes such fragments",
    ),
    DropReason(
        227, "IPV6_EXTENSION", "IPv6 extension header not followed",
        "the packet has more extension headers than are followed, or one that is not known",
        "send without these extension headers",
    ),
    DropReason(
        228, "FORBIDDEN_ARP", "Forbidden ARP",
        "the pod sent ARP for an address that is not its own",
        "if the pod rightly uses that address, list it in its annotation meshbridge.io/extra-addresses",
    ),
    DropReason(
        229, "COMPENSATION", "Compensation denied",
        "the port bypasses Envoy, and the mesh's policy would not have allowed this without Envoy's check",
        "remove the port from the pod's traffic.sidecar.istio.io/exclude annotations, or allow the peer without L7",
    ),
    DropReason(
        230, "NO_SERVICE_BACKENDS", "No service backends known",
        "the address is a Service's, and no pod is known to answer behind this port, so policy cannot say who it is",
        "start a pod that the Service selects, correct its selector or targetPort, or allow the pod all egress",
    ),
)  # fmt: skip

_BY_NUMBER = {reason.number: reason for reason in _REASONS}
FORWARDED = DropReason(0, "DROP_REASON_UNKNOWN", "", "", "")


def drop_reason(number: int) -> DropReason:
    """The reason with this number; one that says "unknown" for a number of a newer kernel side, never an error."""
    if number == 0:
        return FORWARDED
    return _BY_NUMBER.get(number) or DropReason(
        number, f"REASON_{number}", f"Reason {number}", "this version does not know the reason",
        "use the command line of the agent's version",
    )  # fmt: skip

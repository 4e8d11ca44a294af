# Generated from bpf/abi.h by `python -m meshbridge.abi`; not to be edited.
import ctypes
from collections.abc import Mapping
from enum import IntEnum, IntFlag
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any

from meshbridge.errors import MeshBridgeError

V4_MAPPED: bytes

class AbiError(MeshBridgeError): ...
class AbiStruct(ctypes.Structure): ...

def bpf_directory() -> Path: ...
def address_bytes(address: IPv4Address | IPv6Address) -> bytes: ...
def parse_address(raw: bytes) -> IPv4Address | IPv6Address: ...
def network_bytes(network: IPv4Network | IPv6Network) -> tuple[int, bytes]: ...
def class_name(name: str) -> str: ...
def parse_header(text: str) -> dict[str, Any]: ...
def render_stub(declared: Mapping[str, Any]) -> str: ...

ABI_VERSION: int

POLICY_KEY_PORT: int

POLICY_KEY_PROTOCOL: int

POLICY_KEY_PREFIX: int

POLICY_KEY_LAYER: int

POLICY_KEY_USED: int

POLICY_PREFIX_PROTO: int

POLICY_PREFIX_PORT: int

POLICY_PREFIX_ANY: int

POLICY_HASH_FIRST: int

POLICY_HASH_SECOND: int

POLICY_BUCKET_KEYS: int

POLICY_LINE_VALUES: int

EVENT_WINDOW_NS: int

EVENTS_PER_WINDOW: int

class IpFamily(IntEnum):
    FAMILY_IPV4 = 0
    FAMILY_IPV6 = 1

class Direction(IntEnum):
    DIR_INGRESS = 0
    DIR_EGRESS = 1

class PolicyLayer(IntEnum):
    LAYER_NETWORK = 0
    LAYER_MESH = 1

class PolicyVerdict(IntEnum):
    POLICY_NONE = 0
    POLICY_ALLOW = 1
    POLICY_DENY = 2
    POLICY_NEEDS_L7 = 3

class PolicyFlags(IntFlag):
    POLICY_F_AUDIT = 1

class EventType(IntEnum):
    EVENT_DROP = 1
    EVENT_VERDICT = 2
    EVENT_TRACE = 3
    EVENT_LOST = 4

class MatchType(IntEnum):
    MATCH_NONE = 0
    MATCH_L3_ONLY = 1
    MATCH_L3_L4 = 2
    MATCH_L4_ONLY = 3
    MATCH_ALL = 4
    MATCH_L3_PROTO = 5
    MATCH_PROTO_ONLY = 6

class DropReason(IntEnum):
    DROP_NONE = 0
    DROP_INVALID_SOURCE_IP = 132
    DROP_POLICY = 133
    DROP_INVALID_PACKET = 134
    DROP_UNKNOWN_L4 = 142
    DROP_UNKNOWN_L3_TARGET = 150
    DROP_FRAG_NEEDED_STATE = 157
    DROP_UNSUPPORTED_L2 = 166
    DROP_FRAG_NOT_FOUND = 175
    DROP_FORBIDDEN_ICMP6 = 176
    DROP_POLICY_DENY = 181
    DROP_VLAN = 182
    DROP_ENDPOINT_NOT_READY = 203
    DROP_MESH_POLICY = 220
    DROP_MESH_POLICY_DENY = 221
    DROP_NO_L7_JUDGE = 222
    DROP_SERVICE_BACKENDS_DIFFER = 223
    DROP_ICMP_ERROR_UNRELATED = 224
    DROP_FRAG_TINY = 225
    DROP_FRAG_OVERLAP = 226
    DROP_IPV6_EXTENSION = 227
    DROP_FORBIDDEN_ARP = 228
    DROP_COMPENSATION = 229
    DROP_NO_SERVICE_BACKENDS = 230

class ReservedIdentity(IntEnum):
    IDENTITY_ANY = 0
    IDENTITY_HOST = 1
    IDENTITY_WORLD = 2
    IDENTITY_UNMANAGED = 3
    IDENTITY_HEALTH = 4
    IDENTITY_INIT = 5
    IDENTITY_REMOTE_NODE = 6
    IDENTITY_KUBE_APISERVER = 7
    IDENTITY_INGRESS = 8
    IDENTITY_WORLD_IPV4 = 9
    IDENTITY_WORLD_IPV6 = 10
    IDENTITY_FIRST_LOCAL = 256

class EndpointFlags(IntFlag):
    ENDPOINT_F_READY = 1
    ENDPOINT_F_NO_LOCALHOST = 2
    ENDPOINT_F_MAC = 4

class EndpointKey(AbiStruct):
    ifindex: int
    def __init__(self, *, ifindex: int = ...) -> None: ...

class EndpointValue(AbiStruct):
    ifindex: int
    id: int
    incarnation: int
    identity: int
    revision: int
    flags: int
    policy_set: ctypes.Array[ctypes.c_uint]
    mac: ctypes.Array[ctypes.c_ubyte]
    flow_table: int
    ifindex_again: int
    def __init__(
        self,
        *,
        ifindex: int = ...,
        id: int = ...,
        incarnation: int = ...,
        identity: int = ...,
        revision: int = ...,
        flags: int = ...,
        policy_set: ctypes.Array[ctypes.c_uint] = ...,
        mac: ctypes.Array[ctypes.c_ubyte] = ...,
        flow_table: int = ...,
        ifindex_again: int = ...,
    ) -> None: ...

class EndpointAddressKey(AbiStruct):
    ifindex: int
    address: ctypes.Array[ctypes.c_ubyte]
    def __init__(self, *, ifindex: int = ..., address: ctypes.Array[ctypes.c_ubyte] = ...) -> None: ...

class EndpointAddressValue(AbiStruct):
    incarnation: int
    def __init__(self, *, incarnation: int = ...) -> None: ...

class IpcacheKey(AbiStruct):
    address: ctypes.Array[ctypes.c_ubyte]
    def __init__(self, *, address: ctypes.Array[ctypes.c_ubyte] = ...) -> None: ...

class IpcacheCidrKey(AbiStruct):
    prefix_bits: int
    address: ctypes.Array[ctypes.c_ubyte]
    def __init__(self, *, prefix_bits: int = ..., address: ctypes.Array[ctypes.c_ubyte] = ...) -> None: ...

class IpcacheValue(AbiStruct):
    identity: int
    forwarded_identity: int
    def __init__(self, *, identity: int = ..., forwarded_identity: int = ...) -> None: ...

class PolicyValue(AbiStruct):
    precedence: int
    rule_id: int
    verdict: int
    flags: int
    deny_reason: int
    pad: int
    def __init__(
        self,
        *,
        precedence: int = ...,
        rule_id: int = ...,
        verdict: int = ...,
        flags: int = ...,
        deny_reason: int = ...,
        pad: int = ...,
    ) -> None: ...

class PolicyBucket(AbiStruct):
    keys: ctypes.Array[ctypes.c_ulong]
    values: ctypes.Array[ctypes.c_ushort]
    more: int
    pad: ctypes.Array[ctypes.c_ubyte]
    def __init__(
        self,
        *,
        keys: ctypes.Array[ctypes.c_ulong] = ...,
        values: ctypes.Array[ctypes.c_ushort] = ...,
        more: int = ...,
        pad: ctypes.Array[ctypes.c_ubyte] = ...,
    ) -> None: ...

class PolicyValues(AbiStruct):
    values: ctypes.Array[PolicyValue]
    pad: ctypes.Array[ctypes.c_ubyte]
    def __init__(self, *, values: ctypes.Array[PolicyValue] = ..., pad: ctypes.Array[ctypes.c_ubyte] = ...) -> None: ...

class PolicySetKey(AbiStruct):
    set_id: int
    def __init__(self, *, set_id: int = ...) -> None: ...

class PolicyLayerDefault(AbiStruct):
    prefixes: int
    any_prefixes: int
    rule_id: int
    verdict: int
    deny_reason: int
    flags: int
    pad: int
    def __init__(
        self,
        *,
        prefixes: int = ...,
        any_prefixes: int = ...,
        rule_id: int = ...,
        verdict: int = ...,
        deny_reason: int = ...,
        flags: int = ...,
        pad: int = ...,
    ) -> None: ...

class PolicySetValue(AbiStruct):
    layers: ctypes.Array[PolicyLayerDefault]
    seed: int
    first_line: int
    buckets: int
    lines: int
    pad: ctypes.Array[ctypes.c_ubyte]
    def __init__(
        self,
        *,
        layers: ctypes.Array[PolicyLayerDefault] = ...,
        seed: int = ...,
        first_line: int = ...,
        buckets: int = ...,
        lines: int = ...,
        pad: ctypes.Array[ctypes.c_ubyte] = ...,
    ) -> None: ...

class ConntrackKey(AbiStruct):
    source: ctypes.Array[ctypes.c_ubyte]
    destination: ctypes.Array[ctypes.c_ubyte]
    source_port: int
    destination_port: int
    protocol: int
    direction: int
    pad: ctypes.Array[ctypes.c_ubyte]
    def __init__(
        self,
        *,
        source: ctypes.Array[ctypes.c_ubyte] = ...,
        destination: ctypes.Array[ctypes.c_ubyte] = ...,
        source_port: int = ...,
        destination_port: int = ...,
        protocol: int = ...,
        direction: int = ...,
        pad: ctypes.Array[ctypes.c_ubyte] = ...,
    ) -> None: ...

class ConntrackFlags(IntFlag):
    CONNTRACK_F_REPLIED = 1
    CONNTRACK_F_CLOSING = 2
    CONNTRACK_F_FORWARDED = 4
    CONNTRACK_F_FIN_OPENER = 8
    CONNTRACK_F_FIN_ANSWERER = 16

class ConntrackValue(AbiStruct):
    seen_ns: int
    revision: int
    peer_identity: int
    rule_id: int
    flags: int
    def __init__(
        self, *, seen_ns: int = ..., revision: int = ..., peer_identity: int = ..., rule_id: int = ..., flags: int = ...
    ) -> None: ...

class FragmentKey(AbiStruct):
    incarnation: int
    id: int
    source: ctypes.Array[ctypes.c_ubyte]
    destination: ctypes.Array[ctypes.c_ubyte]
    protocol: int
    direction: int
    pad: ctypes.Array[ctypes.c_ubyte]
    def __init__(
        self,
        *,
        incarnation: int = ...,
        id: int = ...,
        source: ctypes.Array[ctypes.c_ubyte] = ...,
        destination: ctypes.Array[ctypes.c_ubyte] = ...,
        protocol: int = ...,
        direction: int = ...,
        pad: ctypes.Array[ctypes.c_ubyte] = ...,
    ) -> None: ...

class FragmentValue(AbiStruct):
    seen_ns: int
    source_port: int
    destination_port: int
    icmp_type: int
    icmp_code: int
    protocol: int
    header_units: int
    def __init__(
        self,
        *,
        seen_ns: int = ...,
        source_port: int = ...,
        destination_port: int = ...,
        icmp_type: int = ...,
        icmp_code: int = ...,
        protocol: int = ...,
        header_units: int = ...,
    ) -> None: ...

class MetricKey(AbiStruct):
    reason: int
    direction: int
    pad: ctypes.Array[ctypes.c_ubyte]
    def __init__(self, *, reason: int = ..., direction: int = ..., pad: ctypes.Array[ctypes.c_ubyte] = ...) -> None: ...

class MetricValue(AbiStruct):
    packets: int
    bytes: int
    def __init__(self, *, packets: int = ..., bytes: int = ...) -> None: ...

class EventLimiter(AbiStruct):
    window_start_ns: int
    sent: int
    lost: int
    def __init__(self, *, window_start_ns: int = ..., sent: int = ..., lost: int = ...) -> None: ...

class FlowEvent(AbiStruct):
    time_ns: int
    endpoint_id: int
    ifindex: int
    source_identity: int
    destination_identity: int
    network_rule_id: int
    mesh_rule_id: int
    lost: int
    packet_bytes: int
    uid: int
    source: ctypes.Array[ctypes.c_ubyte]
    destination: ctypes.Array[ctypes.c_ubyte]
    source_port: int
    destination_port: int
    type: int
    reason: int
    direction: int
    family: int
    protocol: int
    tcp_flags: int
    icmp_type: int
    icmp_code: int
    network_verdict: int
    mesh_verdict: int
    match_type: int
    is_reply: int
    ethertype: int
    audit: int
    rejudged: int
    cgroup_id: int
    def __init__(
        self,
        *,
        time_ns: int = ...,
        endpoint_id: int = ...,
        ifindex: int = ...,
        source_identity: int = ...,
        destination_identity: int = ...,
        network_rule_id: int = ...,
        mesh_rule_id: int = ...,
        lost: int = ...,
        packet_bytes: int = ...,
        uid: int = ...,
        source: ctypes.Array[ctypes.c_ubyte] = ...,
        destination: ctypes.Array[ctypes.c_ubyte] = ...,
        source_port: int = ...,
        destination_port: int = ...,
        type: int = ...,
        reason: int = ...,
        direction: int = ...,
        family: int = ...,
        protocol: int = ...,
        tcp_flags: int = ...,
        icmp_type: int = ...,
        icmp_code: int = ...,
        network_verdict: int = ...,
        mesh_verdict: int = ...,
        match_type: int = ...,
        is_reply: int = ...,
        ethertype: int = ...,
        audit: int = ...,
        rejudged: int = ...,
        cgroup_id: int = ...,
    ) -> None: ...

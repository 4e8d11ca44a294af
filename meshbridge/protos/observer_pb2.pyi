from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetFlowsRequest(_message.Message):
    __slots__ = ("follow", "last")
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    follow: bool
    last: int
    def __init__(self, follow: _Optional[bool] = ..., last: _Optional[int] = ...) -> None: ...

class Peer(_message.Message):
    __slots__ = ("namespace", "pod", "identity", "entities", "labels")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    POD_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    ENTITIES_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    pod: str
    identity: int
    entities: _containers.RepeatedScalarFieldContainer[str]
    labels: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, namespace: _Optional[str] = ..., pod: _Optional[str] = ..., identity: _Optional[int] = ..., entities: _Optional[_Iterable[str]] = ..., labels: _Optional[_Iterable[str]] = ...) -> None: ...

class Rule(_message.Message):
    __slots__ = ("kind", "namespace", "name", "rule", "file", "line", "tier")
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    LINE_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    kind: str
    namespace: str
    name: str
    rule: str
    file: str
    line: int
    tier: str
    def __init__(self, kind: _Optional[str] = ..., namespace: _Optional[str] = ..., name: _Optional[str] = ..., rule: _Optional[str] = ..., file: _Optional[str] = ..., line: _Optional[int] = ..., tier: _Optional[str] = ...) -> None: ...

class Flow(_message.Message):
    __slots__ = ("time_unix_ns", "node", "endpoint_id", "direction", "type", "verdict", "reason", "reason_name", "source_address", "destination_address", "source_port", "destination_port", "protocol", "tcp_flags", "icmp_type", "icmp_code", "source", "destination", "layer", "network_verdict", "mesh_verdict", "network_rules", "mesh_rules", "match_type", "is_reply", "packet_bytes", "uid", "lost", "rejudged", "audit", "ifindex", "ethertype", "lost_by", "agent", "cgroup_id")
    TIME_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ENDPOINT_ID_FIELD_NUMBER: _ClassVar[int]
    DIRECTION_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    REASON_NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_PORT_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_PORT_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    TCP_FLAGS_FIELD_NUMBER: _ClassVar[int]
    ICMP_TYPE_FIELD_NUMBER: _ClassVar[int]
    ICMP_CODE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    NETWORK_VERDICT_FIELD_NUMBER: _ClassVar[int]
    MESH_VERDICT_FIELD_NUMBER: _ClassVar[int]
    NETWORK_RULES_FIELD_NUMBER: _ClassVar[int]
    MESH_RULES_FIELD_NUMBER: _ClassVar[int]
    MATCH_TYPE_FIELD_NUMBER: _ClassVar[int]
    IS_REPLY_FIELD_NUMBER: _ClassVar[int]
    PACKET_BYTES_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    REJUDGED_FIELD_NUMBER: _ClassVar[int]
    AUDIT_FIELD_NUMBER: _ClassVar[int]
    IFINDEX_FIELD_NUMBER: _ClassVar[int]
    ETHERTYPE_FIELD_NUMBER: _ClassVar[int]
    LOST_BY_FIELD_NUMBER: _ClassVar[int]
    AGENT_FIELD_NUMBER: _ClassVar[int]
    CGROUP_ID_FIELD_NUMBER: _ClassVar[int]
    time_unix_ns: int
    node: str
    endpoint_id: int
    direction: str
    type: str
    verdict: str
    reason: int
    reason_name: str
    source_address: bytes
    destination_address: bytes
    source_port: int
    destination_port: int
    protocol: str
    tcp_flags: int
    icmp_type: int
    icmp_code: int
    source: Peer
    destination: Peer
    layer: str
    network_verdict: str
    mesh_verdict: str
    network_rules: _containers.RepeatedCompositeFieldContainer[Rule]
    mesh_rules: _containers.RepeatedCompositeFieldContainer[Rule]
    match_type: str
    is_reply: int
    packet_bytes: int
    uid: int
    lost: int
    rejudged: bool
    audit: bool
    ifindex: int
    ethertype: int
    lost_by: str
    agent: AgentEvent
    cgroup_id: int
    def __init__(self, time_unix_ns: _Optional[int] = ..., node: _Optional[str] = ..., endpoint_id: _Optional[int] = ..., direction: _Optional[str] = ..., type: _Optional[str] = ..., verdict: _Optional[str] = ..., reason: _Optional[int] = ..., reason_name: _Optional[str] = ..., source_address: _Optional[bytes] = ..., destination_address: _Optional[bytes] = ..., source_port: _Optional[int] = ..., destination_port: _Optional[int] = ..., protocol: _Optional[str] = ..., tcp_flags: _Optional[int] = ..., icmp_type: _Optional[int] = ..., icmp_code: _Optional[int] = ..., source: _Optional[_Union[Peer, _Mapping]] = ..., destination: _Optional[_Union[Peer, _Mapping]] = ..., layer: _Optional[str] = ..., network_verdict: _Optional[str] = ..., mesh_verdict: _Optional[str] = ..., network_rules: _Optional[_Iterable[_Union[Rule, _Mapping]]] = ..., mesh_rules: _Optional[_Iterable[_Union[Rule, _Mapping]]] = ..., match_type: _Optional[str] = ..., is_reply: _Optional[int] = ..., packet_bytes: _Optional[int] = ..., uid: _Optional[int] = ..., lost: _Optional[int] = ..., rejudged: _Optional[bool] = ..., audit: _Optional[bool] = ..., ifindex: _Optional[int] = ..., ethertype: _Optional[int] = ..., lost_by: _Optional[str] = ..., agent: _Optional[_Union[AgentEvent, _Mapping]] = ..., cgroup_id: _Optional[int] = ...) -> None: ...

class AgentEvent(_message.Message):
    __slots__ = ("name", "details")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    name: str
    details: _containers.RepeatedCompositeFieldContainer[Detail]
    def __init__(self, name: _Optional[str] = ..., details: _Optional[_Iterable[_Union[Detail, _Mapping]]] = ...) -> None: ...

class Detail(_message.Message):
    __slots__ = ("key", "value")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    key: str
    value: str
    def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...

class ListEndpointsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListEndpointsResponse(_message.Message):
    __slots__ = ("endpoints",)
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    endpoints: _containers.RepeatedCompositeFieldContainer[EndpointState]
    def __init__(self, endpoints: _Optional[_Iterable[_Union[EndpointState, _Mapping]]] = ...) -> None: ...

class EndpointState(_message.Message):
    __slots__ = ("id", "namespace", "pod", "uid", "identity", "labels", "addresses", "state", "message", "ingress_enforced", "egress_enforced", "ingress_policies", "egress_policies", "interface", "attach_mode", "conditions")
    ID_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    POD_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    INGRESS_ENFORCED_FIELD_NUMBER: _ClassVar[int]
    EGRESS_ENFORCED_FIELD_NUMBER: _ClassVar[int]
    INGRESS_POLICIES_FIELD_NUMBER: _ClassVar[int]
    EGRESS_POLICIES_FIELD_NUMBER: _ClassVar[int]
    INTERFACE_FIELD_NUMBER: _ClassVar[int]
    ATTACH_MODE_FIELD_NUMBER: _ClassVar[int]
    CONDITIONS_FIELD_NUMBER: _ClassVar[int]
    id: int
    namespace: str
    pod: str
    uid: str
    identity: int
    labels: _containers.RepeatedScalarFieldContainer[str]
    addresses: _containers.RepeatedScalarFieldContainer[bytes]
    state: str
    message: str
    ingress_enforced: bool
    egress_enforced: bool
    ingress_policies: _containers.RepeatedCompositeFieldContainer[Rule]
    egress_policies: _containers.RepeatedCompositeFieldContainer[Rule]
    interface: str
    attach_mode: str
    conditions: _containers.RepeatedCompositeFieldContainer[Condition]
    def __init__(self, id: _Optional[int] = ..., namespace: _Optional[str] = ..., pod: _Optional[str] = ..., uid: _Optional[str] = ..., identity: _Optional[int] = ..., labels: _Optional[_Iterable[str]] = ..., addresses: _Optional[_Iterable[bytes]] = ..., state: _Optional[str] = ..., message: _Optional[str] = ..., ingress_enforced: _Optional[bool] = ..., egress_enforced: _Optional[bool] = ..., ingress_policies: _Optional[_Iterable[_Union[Rule, _Mapping]]] = ..., egress_policies: _Optional[_Iterable[_Union[Rule, _Mapping]]] = ..., interface: _Optional[str] = ..., attach_mode: _Optional[str] = ..., conditions: _Optional[_Iterable[_Union[Condition, _Mapping]]] = ...) -> None: ...

class Condition(_message.Message):
    __slots__ = ("type", "status", "reason", "message", "since_unix_ns", "unknown")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    SINCE_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    UNKNOWN_FIELD_NUMBER: _ClassVar[int]
    type: str
    status: bool
    reason: str
    message: str
    since_unix_ns: int
    unknown: bool
    def __init__(self, type: _Optional[str] = ..., status: _Optional[bool] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., since_unix_ns: _Optional[int] = ..., unknown: _Optional[bool] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Status(_message.Message):
    __slots__ = ("node", "version", "revision_programmed", "revision_received", "controller_connected", "endpoints_ready", "endpoints_total", "identities", "addresses", "policies", "events_lost", "problems", "attach_mode", "memory_resident_bytes", "uptime_s")
    NODE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REVISION_PROGRAMMED_FIELD_NUMBER: _ClassVar[int]
    REVISION_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    CONTROLLER_CONNECTED_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_READY_FIELD_NUMBER: _ClassVar[int]
    ENDPOINTS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    IDENTITIES_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    POLICIES_FIELD_NUMBER: _ClassVar[int]
    EVENTS_LOST_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    ATTACH_MODE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    node: str
    version: str
    revision_programmed: int
    revision_received: int
    controller_connected: bool
    endpoints_ready: int
    endpoints_total: int
    identities: int
    addresses: int
    policies: int
    events_lost: int
    problems: _containers.RepeatedScalarFieldContainer[str]
    attach_mode: str
    memory_resident_bytes: int
    uptime_s: float
    def __init__(self, node: _Optional[str] = ..., version: _Optional[str] = ..., revision_programmed: _Optional[int] = ..., revision_received: _Optional[int] = ..., controller_connected: _Optional[bool] = ..., endpoints_ready: _Optional[int] = ..., endpoints_total: _Optional[int] = ..., identities: _Optional[int] = ..., addresses: _Optional[int] = ..., policies: _Optional[int] = ..., events_lost: _Optional[int] = ..., problems: _Optional[_Iterable[str]] = ..., attach_mode: _Optional[str] = ..., memory_resident_bytes: _Optional[int] = ..., uptime_s: _Optional[float] = ...) -> None: ...

class GetBypassesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Bypasses(_message.Message):
    __slots__ = ("node", "json")
    NODE_FIELD_NUMBER: _ClassVar[int]
    JSON_FIELD_NUMBER: _ClassVar[int]
    node: str
    json: bytes
    def __init__(self, node: _Optional[str] = ..., json: _Optional[bytes] = ...) -> None: ...

class AddEndpointRequest(_message.Message):
    __slots__ = ("namespace", "pod", "uid", "interfaces", "netns", "wait_ready", "timeout_s")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    POD_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    INTERFACES_FIELD_NUMBER: _ClassVar[int]
    NETNS_FIELD_NUMBER: _ClassVar[int]
    WAIT_READY_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    pod: str
    uid: str
    interfaces: _containers.RepeatedScalarFieldContainer[str]
    netns: str
    wait_ready: bool
    timeout_s: float
    def __init__(self, namespace: _Optional[str] = ..., pod: _Optional[str] = ..., uid: _Optional[str] = ..., interfaces: _Optional[_Iterable[str]] = ..., netns: _Optional[str] = ..., wait_ready: _Optional[bool] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class AddEndpointResponse(_message.Message):
    __slots__ = ("endpoint_id", "ready")
    ENDPOINT_ID_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    endpoint_id: int
    ready: bool
    def __init__(self, endpoint_id: _Optional[int] = ..., ready: _Optional[bool] = ...) -> None: ...

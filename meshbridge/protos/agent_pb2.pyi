from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Endpoint(_message.Message):
    __slots__ = ("namespace", "name", "uid", "node", "addresses", "labels", "namespace_labels", "annotations", "service_account", "ports", "probe_ports", "proxy", "host_network", "istio_init", "phase", "extra_addresses", "istio_proxy", "init_containers", "fault")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class NamespaceLabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class AnnotationsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_LABELS_FIELD_NUMBER: _ClassVar[int]
    ANNOTATIONS_FIELD_NUMBER: _ClassVar[int]
    SERVICE_ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    PORTS_FIELD_NUMBER: _ClassVar[int]
    PROBE_PORTS_FIELD_NUMBER: _ClassVar[int]
    PROXY_FIELD_NUMBER: _ClassVar[int]
    HOST_NETWORK_FIELD_NUMBER: _ClassVar[int]
    ISTIO_INIT_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    EXTRA_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    ISTIO_PROXY_FIELD_NUMBER: _ClassVar[int]
    INIT_CONTAINERS_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    name: str
    uid: str
    node: str
    addresses: _containers.RepeatedScalarFieldContainer[bytes]
    labels: _containers.ScalarMap[str, str]
    namespace_labels: _containers.ScalarMap[str, str]
    annotations: _containers.ScalarMap[str, str]
    service_account: str
    ports: _containers.RepeatedCompositeFieldContainer[ContainerPort]
    probe_ports: _containers.RepeatedScalarFieldContainer[str]
    proxy: str
    host_network: bool
    istio_init: InitContainer
    phase: str
    extra_addresses: _containers.RepeatedScalarFieldContainer[bytes]
    istio_proxy: ProxyContainer
    init_containers: _containers.RepeatedScalarFieldContainer[str]
    fault: str
    def __init__(self, namespace: _Optional[str] = ..., name: _Optional[str] = ..., uid: _Optional[str] = ..., node: _Optional[str] = ..., addresses: _Optional[_Iterable[bytes]] = ..., labels: _Optional[_Mapping[str, str]] = ..., namespace_labels: _Optional[_Mapping[str, str]] = ..., annotations: _Optional[_Mapping[str, str]] = ..., service_account: _Optional[str] = ..., ports: _Optional[_Iterable[_Union[ContainerPort, _Mapping]]] = ..., probe_ports: _Optional[_Iterable[str]] = ..., proxy: _Optional[str] = ..., host_network: _Optional[bool] = ..., istio_init: _Optional[_Union[InitContainer, _Mapping]] = ..., phase: _Optional[str] = ..., extra_addresses: _Optional[_Iterable[bytes]] = ..., istio_proxy: _Optional[_Union[ProxyContainer, _Mapping]] = ..., init_containers: _Optional[_Iterable[str]] = ..., fault: _Optional[str] = ...) -> None: ...

class ContainerPort(_message.Message):
    __slots__ = ("name", "port", "protocol")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    name: str
    port: int
    protocol: str
    def __init__(self, name: _Optional[str] = ..., port: _Optional[int] = ..., protocol: _Optional[str] = ...) -> None: ...

class InitContainer(_message.Message):
    __slots__ = ("args", "env")
    class EnvEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ARGS_FIELD_NUMBER: _ClassVar[int]
    ENV_FIELD_NUMBER: _ClassVar[int]
    args: _containers.RepeatedScalarFieldContainer[str]
    env: _containers.ScalarMap[str, str]
    def __init__(self, args: _Optional[_Iterable[str]] = ..., env: _Optional[_Mapping[str, str]] = ...) -> None: ...

class ProxyContainer(_message.Message):
    __slots__ = ("kind", "env", "uid", "gid", "native")
    class EnvEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    KIND_FIELD_NUMBER: _ClassVar[int]
    ENV_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    GID_FIELD_NUMBER: _ClassVar[int]
    NATIVE_FIELD_NUMBER: _ClassVar[int]
    kind: str
    env: _containers.ScalarMap[str, str]
    uid: int
    gid: int
    native: bool
    def __init__(self, kind: _Optional[str] = ..., env: _Optional[_Mapping[str, str]] = ..., uid: _Optional[int] = ..., gid: _Optional[int] = ..., native: _Optional[bool] = ...) -> None: ...

class Policy(_message.Message):
    __slots__ = ("api_version", "kind", "namespace", "name", "uid", "json", "file", "lines", "fault")
    class LinesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    API_VERSION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    JSON_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    LINES_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    api_version: str
    kind: str
    namespace: str
    name: str
    uid: str
    json: bytes
    file: str
    lines: _containers.ScalarMap[str, int]
    fault: str
    def __init__(self, api_version: _Optional[str] = ..., kind: _Optional[str] = ..., namespace: _Optional[str] = ..., name: _Optional[str] = ..., uid: _Optional[str] = ..., json: _Optional[bytes] = ..., file: _Optional[str] = ..., lines: _Optional[_Mapping[str, int]] = ..., fault: _Optional[str] = ...) -> None: ...

class Address(_message.Message):
    __slots__ = ("address", "namespace", "name", "labels", "namespace_labels", "service_account", "cluster", "trust_domain", "proxy", "entities", "node", "uid", "ports", "excluded")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class NamespaceLabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_LABELS_FIELD_NUMBER: _ClassVar[int]
    SERVICE_ACCOUNT_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    TRUST_DOMAIN_FIELD_NUMBER: _ClassVar[int]
    PROXY_FIELD_NUMBER: _ClassVar[int]
    ENTITIES_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    PORTS_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_FIELD_NUMBER: _ClassVar[int]
    address: bytes
    namespace: str
    name: str
    labels: _containers.ScalarMap[str, str]
    namespace_labels: _containers.ScalarMap[str, str]
    service_account: str
    cluster: str
    trust_domain: str
    proxy: str
    entities: _containers.RepeatedScalarFieldContainer[str]
    node: str
    uid: str
    ports: _containers.RepeatedCompositeFieldContainer[ContainerPort]
    excluded: _containers.RepeatedCompositeFieldContainer[TcpPorts]
    def __init__(self, address: _Optional[bytes] = ..., namespace: _Optional[str] = ..., name: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., namespace_labels: _Optional[_Mapping[str, str]] = ..., service_account: _Optional[str] = ..., cluster: _Optional[str] = ..., trust_domain: _Optional[str] = ..., proxy: _Optional[str] = ..., entities: _Optional[_Iterable[str]] = ..., node: _Optional[str] = ..., uid: _Optional[str] = ..., ports: _Optional[_Iterable[_Union[ContainerPort, _Mapping]]] = ..., excluded: _Optional[_Iterable[_Union[TcpPorts, _Mapping]]] = ...) -> None: ...

class TcpPorts(_message.Message):
    __slots__ = ("ipv6", "first", "last")
    IPV6_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    ipv6: bool
    first: int
    last: int
    def __init__(self, ipv6: _Optional[bool] = ..., first: _Optional[int] = ..., last: _Optional[int] = ...) -> None: ...

class Service(_message.Message):
    __slots__ = ("namespace", "name", "addresses", "ports", "outside_addresses")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    PORTS_FIELD_NUMBER: _ClassVar[int]
    OUTSIDE_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    name: str
    addresses: _containers.RepeatedScalarFieldContainer[bytes]
    ports: _containers.RepeatedCompositeFieldContainer[ServicePort]
    outside_addresses: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, namespace: _Optional[str] = ..., name: _Optional[str] = ..., addresses: _Optional[_Iterable[bytes]] = ..., ports: _Optional[_Iterable[_Union[ServicePort, _Mapping]]] = ..., outside_addresses: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ServicePort(_message.Message):
    __slots__ = ("protocol", "port", "backends")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    BACKENDS_FIELD_NUMBER: _ClassVar[int]
    protocol: str
    port: int
    backends: _containers.RepeatedCompositeFieldContainer[ServiceBackends]
    def __init__(self, protocol: _Optional[str] = ..., port: _Optional[int] = ..., backends: _Optional[_Iterable[_Union[ServiceBackends, _Mapping]]] = ...) -> None: ...

class ServiceBackends(_message.Message):
    __slots__ = ("port", "addresses")
    PORT_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    port: int
    addresses: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, port: _Optional[int] = ..., addresses: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Mesh(_message.Message):
    __slots__ = ("root_namespace", "trust_domain", "trust_domain_aliases", "cluster", "all_mesh_policies", "providers", "registry_only", "own_sidecars")
    ROOT_NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    TRUST_DOMAIN_FIELD_NUMBER: _ClassVar[int]
    TRUST_DOMAIN_ALIASES_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    ALL_MESH_POLICIES_FIELD_NUMBER: _ClassVar[int]
    PROVIDERS_FIELD_NUMBER: _ClassVar[int]
    REGISTRY_ONLY_FIELD_NUMBER: _ClassVar[int]
    OWN_SIDECARS_FIELD_NUMBER: _ClassVar[int]
    root_namespace: str
    trust_domain: str
    trust_domain_aliases: _containers.RepeatedScalarFieldContainer[str]
    cluster: str
    all_mesh_policies: bool
    providers: ExtensionProviders
    registry_only: bool
    own_sidecars: bool
    def __init__(self, root_namespace: _Optional[str] = ..., trust_domain: _Optional[str] = ..., trust_domain_aliases: _Optional[_Iterable[str]] = ..., cluster: _Optional[str] = ..., all_mesh_policies: _Optional[bool] = ..., providers: _Optional[_Union[ExtensionProviders, _Mapping]] = ..., registry_only: _Optional[bool] = ..., own_sidecars: _Optional[bool] = ...) -> None: ...

class ExtensionProviders(_message.Message):
    __slots__ = ("kinds",)
    class KindsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    KINDS_FIELD_NUMBER: _ClassVar[int]
    kinds: _containers.ScalarMap[str, str]
    def __init__(self, kinds: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Problem(_message.Message):
    __slots__ = ("text", "file", "line", "reason")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    LINE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    text: str
    file: str
    line: int
    reason: str
    def __init__(self, text: _Optional[str] = ..., file: _Optional[str] = ..., line: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Revision(_message.Message):
    __slots__ = ("number", "controllers")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    CONTROLLERS_FIELD_NUMBER: _ClassVar[int]
    number: int
    controllers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, number: _Optional[int] = ..., controllers: _Optional[_Iterable[str]] = ...) -> None: ...

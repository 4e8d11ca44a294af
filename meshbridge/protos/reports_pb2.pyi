from meshbridge.protos import agent_pb2 as _agent_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ExclusionReport(_message.Message):
    __slots__ = ("groups",)
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[PodExclusions]
    def __init__(self, groups: _Optional[_Iterable[_Union[PodExclusions, _Mapping]]] = ...) -> None: ...

class PodExclusions(_message.Message):
    __slots__ = ("uids", "excluded")
    UIDS_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_FIELD_NUMBER: _ClassVar[int]
    uids: _containers.RepeatedScalarFieldContainer[str]
    excluded: _containers.RepeatedCompositeFieldContainer[_agent_pb2.TcpPorts]
    def __init__(self, uids: _Optional[_Iterable[str]] = ..., excluded: _Optional[_Iterable[_Union[_agent_pb2.TcpPorts, _Mapping]]] = ...) -> None: ...

class ReportsEnded(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

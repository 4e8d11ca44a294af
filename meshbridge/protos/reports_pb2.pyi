from meshbridge.protos import agent_pb2 as _agent_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class NodeReport(_message.Message):
    __slots__ = ("groups", "programmed", "pods")
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    PROGRAMMED_FIELD_NUMBER: _ClassVar[int]
    PODS_FIELD_NUMBER: _ClassVar[int]
    groups: _containers.RepeatedCompositeFieldContainer[PodExclusions]
    programmed: _containers.RepeatedCompositeFieldContainer[ProgrammedPolicy]
    pods: _containers.RepeatedCompositeFieldContainer[PodReport]
    def __init__(self, groups: _Optional[_Iterable[_Union[PodExclusions, _Mapping]]] = ..., programmed: _Optional[_Iterable[_Union[ProgrammedPolicy, _Mapping]]] = ..., pods: _Optional[_Iterable[_Union[PodReport, _Mapping]]] = ...) -> None: ...

class PodExclusions(_message.Message):
    __slots__ = ("uids", "excluded")
    UIDS_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_FIELD_NUMBER: _ClassVar[int]
    uids: _containers.RepeatedScalarFieldContainer[str]
    excluded: _containers.RepeatedCompositeFieldContainer[_agent_pb2.TcpPorts]
    def __init__(self, uids: _Optional[_Iterable[str]] = ..., excluded: _Optional[_Iterable[_Union[_agent_pb2.TcpPorts, _Mapping]]] = ...) -> None: ...

class ProgrammedPolicy(_message.Message):
    __slots__ = ("uid", "generation")
    UID_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    uid: str
    generation: int
    def __init__(self, uid: _Optional[str] = ..., generation: _Optional[int] = ...) -> None: ...

class PodReport(_message.Message):
    __slots__ = ("uid", "conditions")
    UID_FIELD_NUMBER: _ClassVar[int]
    CONDITIONS_FIELD_NUMBER: _ClassVar[int]
    uid: str
    conditions: _containers.RepeatedCompositeFieldContainer[PodCondition]
    def __init__(self, uid: _Optional[str] = ..., conditions: _Optional[_Iterable[_Union[PodCondition, _Mapping]]] = ...) -> None: ...

class PodCondition(_message.Message):
    __slots__ = ("type", "status", "reason", "message")
    class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNKNOWN: _ClassVar[PodCondition.Status]
        TRUE: _ClassVar[PodCondition.Status]
        FALSE: _ClassVar[PodCondition.Status]
    UNKNOWN: PodCondition.Status
    TRUE: PodCondition.Status
    FALSE: PodCondition.Status
    TYPE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    type: str
    status: PodCondition.Status
    reason: str
    message: str
    def __init__(self, type: _Optional[str] = ..., status: _Optional[_Union[PodCondition.Status, str]] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class ReportsEnded(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

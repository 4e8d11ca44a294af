"""Keeps what the controller has sent, by resource name, and makes a view of it per revision."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from meshbridge.authz.view import NodeView
from meshbridge.identity.model import Entity, IpAddress, Peer, Workload
from meshbridge.policy.mesh import MeshSettings
from meshbridge.policy.model import Document
from meshbridge.policy.parse import Parsed, parse
from meshbridge.policy.policyset import PolicySet


@dataclass(slots=True)
class ViewBuilder:
    """The state of ``node`` between revisions. Documents are parsed when they come, not once per revision."""

    mesh: MeshSettings = field(default_factory=MeshSettings)
    node: str = ""
    _workloads: dict[str, Workload] = field(default_factory=dict)
    _holders: dict[str, tuple[IpAddress, Peer]] = field(default_factory=dict)
    _parsed: dict[str, Parsed] = field(default_factory=dict)

    def put_workload(self, name: str, workload: Workload) -> None:
        self._workloads[name] = workload

    def put_holder(self, name: str, address: IpAddress, holder: Peer, node: str = "") -> None:
        """``node`` is where the holder is; this node's own addresses are ``host`` here, as they are to its kernel."""
        if node and node == self.node and Entity.REMOTE_NODE in holder.entities:
            holder = replace(holder, entities=holder.entities - {Entity.REMOTE_NODE} | {Entity.HOST})
        self._holders[name] = (address, holder)

    def put_document(self, name: str, document: Document) -> None:
        self._parsed[name] = parse(document)

    def remove_workload(self, name: str) -> None:
        self._workloads.pop(name, None)

    def remove_holder(self, name: str) -> None:
        self._holders.pop(name, None)

    def remove_document(self, name: str) -> None:
        self._parsed.pop(name, None)

    def view(self, revision: int) -> NodeView:
        """The view of all that is held now."""
        policies = PolicySet.of_parsed(self._parsed.values(), self.mesh)
        return NodeView.of(revision, self._workloads.values(), dict(self._holders.values()), policies)

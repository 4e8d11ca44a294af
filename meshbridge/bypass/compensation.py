"""What stands in for Envoy on a port it does not see: whom the kernel lets in, by address, and why.

The verdicts are those of ``policy.lowering``, so a report says what the kernel does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meshbridge.identity.model import IpNetwork, Peer
from meshbridge.policy.baseline import Flow, Guard, Principal, mesh_verdict
from meshbridge.policy.capture import AppProtocol
from meshbridge.policy.lowering import Outcome, lower_excluded, own_principal
from meshbridge.policy.mesh import Action, MtlsMode
from meshbridge.policy.model import Origin, Verdict


@dataclass(frozen=True, slots=True)
class Compensation:
    """``enforced`` False: nothing is left to enforce, and ``why`` says so. Sources are names of an Inventory.

    ``refused`` of an outbound port are the destinations that refuse, as ``pod:port``; ``registry_only``: it reaches
    nobody whom the mesh's registry does not know.
    """

    enforced: bool
    why: str
    allowed: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    weakened: tuple[str, ...] = ()
    origins: tuple[Origin, ...] = ()
    outbound: bool = False
    registry_only: bool = False

    @property
    def summary(self) -> str:
        """One line: ``none`` with its reason, or how many of the known sources the kernel lets in."""
        if not self.enforced:
            return f"none: {self.why}"
        if self.outbound:
            drops = [f"what {len(self.refused)} known ports refuse this pod"] if self.refused else []
            return f"kernel: drops {', '.join((*(['whom no registry knows'] if self.registry_only else []), *drops))}"
        return f"kernel: lets in {len(self.allowed)} of {len(self.allowed) + len(self.refused)} known sources"


def nothing_to_enforce(guard: Guard, port: int) -> str:
    """Why no mesh policy restricts a port; empty when one does."""
    mode, _ = guard.mtls.at(port)
    enforcing = [p for p in guard.policies if not p.dry_run and p.action is not Action.AUDIT]
    if mode is MtlsMode.STRICT or enforcing or guard.refusals:
        return ""
    return f"mTLS is {mode.value} and no AuthorizationPolicy selects the pod, so everybody was let in before"


def inbound_compensation(guard: Guard, port: int, sources: Mapping[str, Peer], *, probed: bool) -> Compensation:
    """Whom the kernel lets in on an excluded port.

    Args:
        probed: The port is one of a declared probe: the pod's own node passes, whatever the policies say.
    """
    guard = guard.past_envoy
    if why := nothing_to_enforce(guard, port):
        return Compensation(False, why)
    judged: dict[tuple[frozenset[IpNetwork], Principal | str | None], Outcome] = {}
    outcomes: dict[str, Outcome] = {}
    for name, peer in sources.items():
        asked = (peer.networks & guard.networks, own_principal(peer))
        if asked not in judged:
            judged[asked] = excluded_outcome(guard, port, peer)
        outcomes[name] = judged[asked]
    allowed = tuple(name for name, outcome in outcomes.items() if outcome.verdict is Verdict.ALLOW)
    refused = tuple(name for name, outcome in outcomes.items() if outcome.verdict is not Verdict.ALLOW)
    origins = tuple(sorted({origin for outcome in outcomes.values() for origin in outcome.origins}))
    why = "what the mesh would certainly have let in, by address instead of certificate"
    weakened = ("the pod's own node, for its probes",) if probed else ()
    return Compensation(True, why, allowed, refused, weakened, origins)


def excluded_outcome(guard: Guard, port: int, peer: Peer) -> Outcome:
    """What the kernel does with a flow from one source to an excluded port."""
    flow = Flow(peer.networks & guard.networks, port, own_principal(peer))
    return lower_excluded(mesh_verdict(guard.past_envoy, flow, AppProtocol.AUTO))

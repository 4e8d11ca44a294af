"""The sources of a bypassed port by what its mesh policies can tell of them, in terms that network policies have.

For compensation a source is its namespace and service account where it has a proxy, and nobody where it has none. The
names that policies mention cut all sources into finitely many parts, and every part has one verdict.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from meshbridge.errors import MeshBridgeError
from meshbridge.policy.baseline import UNDECIDED, Flow, Guard, Principal, mesh_verdict
from meshbridge.policy.capture import AppProtocol
from meshbridge.policy.lowering import lower_excluded
from meshbridge.policy.mesh import Action, Attribute, AuthorizationPolicy, AuthorizationRule, Condition
from meshbridge.policy.model import Verdict

_ADDRESSES = frozenset({Attribute.IP_BLOCKS, Attribute.REMOTE_IP_BLOCKS, Attribute.DESTINATION_IP})


class InexpressibleError(MeshBridgeError):
    """What a compensation asks of a source, and network policies cannot say."""


@dataclass(frozen=True, slots=True)
class Names:
    """These names; with ``inverted`` all others."""

    names: tuple[str, ...] = ()
    inverted: bool = True

    @property
    def is_any(self) -> bool:
        return self.inverted and not self.names


@dataclass(frozen=True, slots=True)
class MeshPods:
    """Pods with a proxy, by namespace and service account."""

    namespaces: Names
    accounts: Names


@dataclass(frozen=True, slots=True)
class Partition:
    """Who is let in on a port and who is not: pods with a proxy, and everybody else.

    ``anonymous``: pods without a proxy, nodes, the world. ``contested``: an address that may be anybody's.
    """

    allowed: tuple[MeshPods, ...]
    denied: tuple[MeshPods, ...]
    anonymous: bool
    contested: bool

    @property
    def denies_nobody(self) -> bool:
        return self.anonymous and self.contested and not self.denied


def partition(guard: Guard, port: int, concerning: Iterable[AuthorizationRule]) -> Partition:
    """The verdicts of the excluded lowering on one port.

    Args:
        concerning: the rules of ``guard`` that may match on the port.

    Raises:
        InexpressibleError: a rule asks for more than the name of a source.
    """
    rules = set(concerning)
    mentioned = _Mentioned()
    for policy in guard.policies:
        if policy.dry_run or policy.action is Action.AUDIT:
            continue
        for rule in policy.rules:
            if rule in rules:
                for condition in rule.all_conditions:
                    mentioned.add(policy, rule, condition)
    known = sorted(mentioned.namespaces)
    other = _unlike(known)
    alike: dict[tuple[tuple[str, ...], bool], list[str]] = {}
    for namespace in (*known, other):
        accounts = sorted(mentioned.accounts_in(namespace))
        usual = _allows(guard, port, namespace, _unlike(accounts))
        exceptions = tuple(a for a in accounts if _allows(guard, port, namespace, a) is not usual)
        alike.setdefault((exceptions, usual), []).append(namespace)
    sides: dict[bool, list[MeshPods]] = {True: [], False: []}
    for (exceptions, usual), members in alike.items():
        inverted = other in members
        namespaces = Names(tuple(n for n in known if (n in members) is not inverted), inverted)
        sides[usual].append(MeshPods(namespaces, Names(exceptions, inverted=True)))
        if exceptions:
            sides[not usual].append(MeshPods(namespaces, Names(exceptions, inverted=False)))
    anonymous, contested = _verdict(guard, port, None), _verdict(guard, port, UNDECIDED)
    return Partition(tuple(sides[True]), tuple(sides[False]), anonymous, contested)


class _Mentioned:
    """The names that conditions speak of. A service account may be named without a namespace."""

    def __init__(self) -> None:
        self.namespaces: set[str] = set()
        self._accounts: dict[str, set[str]] = {}

    def accounts_in(self, namespace: str) -> set[str]:
        return self._accounts.get("", set()) | self._accounts.get(namespace, set())

    def add(self, policy: AuthorizationPolicy, rule: AuthorizationRule, condition: Condition) -> None:
        if condition.attribute in _ADDRESSES:
            raise InexpressibleError(
                f"asks for {condition.attribute.value}: addresses and names are not asked for together in the dialect",
                where=str(rule.origin),
                fix="let MeshBridge enforce this port itself",
            )
        for value in (*condition.values, *condition.not_values):
            match condition.attribute:
                case Attribute.NAMESPACES if value != "*":
                    if "*" in value:
                        raise _pattern(value, rule)
                    self.namespaces.add(value)
                case Attribute.SERVICE_ACCOUNTS:
                    namespace, _, account = value.rpartition("/")
                    self._account(namespace or policy.namespace, account)
                case Attribute.PRINCIPALS if value != "*":
                    self._principal(value, rule)

    def _principal(self, value: str, rule: AuthorizationRule) -> None:
        """``DOMAIN/ns/NAMESPACE/sa/ACCOUNT``, whole, or cut off at a slash by ``*``."""
        if value.startswith("*"):
            if not value.startswith("*/"):
                raise _pattern(value, rule)
            parts = value[2:].split("/")
            self._account(parts[-3] if len(parts) > 2 else "", parts[-1])
            return
        if value.endswith("*") and not value.endswith("/*"):
            raise _pattern(value, rule)
        parts = value.removesuffix("/*").split("/")
        if len(parts) > 4:
            self._account(parts[2], parts[4])
        elif len(parts) > 2:
            self.namespaces.add(parts[2])

    def _account(self, namespace: str, account: str) -> None:
        if namespace:
            self.namespaces.add(namespace)
        self._accounts.setdefault(namespace, set()).add(account)


def _pattern(value: str, rule: AuthorizationRule) -> InexpressibleError:
    return InexpressibleError(
        f"{value!r} is a pattern inside a name, and labels are matched whole",
        where=str(rule.origin), fix="name the namespaces or service accounts one by one",
    )  # fmt: skip


def _allows(guard: Guard, port: int, namespace: str, account: str) -> bool:
    return _verdict(guard, port, f"spiffe://{guard.mesh.trust_domain}/ns/{namespace}/sa/{account}")


def _verdict(guard: Guard, port: int, principal: Principal | str | None) -> bool:
    baseline = mesh_verdict(guard, Flow(frozenset(), port, principal), AppProtocol.AUTO)
    return lower_excluded(baseline).verdict is Verdict.ALLOW


def _unlike(names: Iterable[str]) -> str:
    """A name that stands for all those not mentioned."""
    return f"{max(names, key=len, default='')}-other"

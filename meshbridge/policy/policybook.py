"""The policies of a cluster as they come and go: one changed object must not cost a pass over all others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from meshbridge.policy.cilium import DEFAULT_SETTINGS
from meshbridge.policy.mesh import DEFAULT_MESH, MeshSettings
from meshbridge.policy.model import Notice, Tier
from meshbridge.policy.parse import Parsed
from meshbridge.policy.policyset import PolicySet, resolver_of
from meshbridge.policy.priorities import equal_priorities
from meshbridge.policy.references import Resolver

_AT_ONCE: Final = 16
"""With more than one object in so many changed, all are put together anew: that is cheaper then."""


@dataclass(slots=True, eq=False)
class PolicyBook(Mapping[str, Parsed]):
    """Parsed objects by name. ``policies`` is what ``PolicySet.of_parsed`` makes of them, whatever came before."""

    _parsed: dict[str, Parsed] = field(default_factory=dict)
    _ranked: dict[str, Parsed] = field(default_factory=dict)
    """Those whose notices depend on each other."""
    _gone: dict[str, Parsed | None] = field(default_factory=dict)
    """By name, what was put into ``_policies`` of those that changed since; None: nothing."""
    _policies: PolicySet | None = None
    _resolver: Resolver = field(default_factory=lambda: Resolver(DEFAULT_SETTINGS))
    _equals: list[Notice] = field(default_factory=list)

    def __getitem__(self, name: str) -> Parsed:
        return self._parsed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parsed)

    def __len__(self) -> int:
        return len(self._parsed)

    def put(self, name: str, parsed: Parsed | None) -> None:
        """This is the object of that name now, or, with None, there is none."""
        before = self._parsed.pop(name, None)
        self._gone.setdefault(name, before)
        self._ranked.pop(name, None)
        if parsed is not None:
            self._parsed[name] = parsed
            if any(rule.tier is not Tier.NORMAL for rule in parsed.network):
                self._ranked[name] = parsed

    def policies(self, mesh: MeshSettings = DEFAULT_MESH) -> PolicySet:
        """All policies as one value; the same object as long as nothing changed."""
        known = self._policies
        old = [parsed for parsed in self._gone.values() if parsed is not None]
        new = [parsed for name in self._gone if (parsed := self._parsed.get(name)) is not None]
        few = len(self._gone) * _AT_ONCE <= len(self._parsed)
        if known is None or known.mesh != mesh or not few or _refers(old) or _refers(new):
            known = self._anew(mesh)
        elif self._gone:
            equals = equal_priorities(self._ranked.values())
            known = known.replaced(
                PolicySet.of_resolved(old, self._resolver, mesh, self._equals),
                PolicySet.of_resolved(new, self._resolver, mesh, equals),
            )
            self._equals = equals
        self._policies = known
        self._gone.clear()
        return known

    def among(self, parsed: Iterable[Parsed], mesh: MeshSettings = DEFAULT_MESH) -> PolicySet:
        """Some objects that are or were here, with their rules as they mean it among all others."""
        return PolicySet.of_resolved(list(parsed), self._resolver, mesh, ())

    def _anew(self, mesh: MeshSettings) -> PolicySet:
        every = list(self._parsed.values())
        self._resolver = resolver_of(every)
        self._equals = equal_priorities(self._ranked.values())
        return PolicySet.of_resolved(every, self._resolver, mesh, self._equals)


def _refers(parsed: Iterable[Parsed]) -> bool:
    """Whether any of these says what the rules of others mean."""
    return any(each.objects or each.cilium is not None for each in parsed)

"""Random AuthorizationPolicies, PeerAuthentications and RequestAuthentications, as documents.

The values are those that the connections of ``envoy_world`` have, near misses of them, and each form of wildcard.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec

ISSUERS = ("https://issuer.test", "https://issuer.test/two")

VALUES: dict[str, list[str]] = {
    "principals": [
        "*", "OWN/ns/finance/sa/client", "ALIAS/ns/*", "*/sa/client", "foreign/ns/finance/sa/client",
        "cluster.local/ns/*", "cluster.local/ns/shop/sa/client", "*/ns/shop/sa/batch", "OWN/ns/shop/sa/client",
    ],
    "namespaces": ["finance", "fin*", "*", "*p", "shop", "s*p"],
    "serviceAccounts": ["client", "finance/client", "shop/batch", "batch"],
    "trustDomains": ["OWN", "ALIAS", "*", "cl*", "*.example", "foreign"],
    "ipBlocks": ["10.1.0.1", "10.1.0.2/31", "10.1.0.0/16", "10.0.0.0/8", "fd00:1::1", "fd00::/16", "0.0.0.0/0", "::/0"],
    "remoteIpBlocks": ["192.0.2.0/24", "198.51.100.4", "10.1.0.0/24", "fd00:1::/64"],
    "requestPrincipals": [
        "*", f"{ISSUERS[0]}/me", f"{ISSUERS[0]}/*", "*/me", "nobody/me", "https://*", "*me", ISSUERS[1],
        f"{ISSUERS[1]}/m*", f"*{ISSUERS[0][6:]}/you",
    ],
    "methods": ["GET", "POST", "P*", "*", "*T", "get"],
    "paths": [
        "/api/v1/process", "/api/*", "*/process", "*", "/api/{*}/process", "/{**}", "/a*b", "/api", "/api/{**}", "/{*}",
        "/API/*", "/static/{*}/{*}", "/api/",
    ],
    "hosts": ["NAME", "NAME.test", "NAM*", "*.test", "*.TEST", "*", "NAME:8080", "x.test"],
    "ports": ["8080", "8081", "9000", "9001", "1"],
}  # fmt: skip
WHEN: dict[str, list[str]] = {
    "request.headers[x-a]": ["1", "*", "v*", "*e", "1,value"],
    "request.headers[X-B]": ["no", "*"],
    "request.auth.claims[scope]": ["transactions", "read", "t*", "*", "read write"],
    "request.auth.claims[deep][level]": ["one", "*", "1", "t*"],
    "request.auth.claims[groups]": ["a", "b*"],
    "request.auth.claims[iss]": [ISSUERS[0], "*two"],
    "request.auth.audiences": ["shop", "*", "ban*"],
    "request.auth.presenter": ["app", "*"],
    "request.auth.principal": VALUES["requestPrincipals"],
    "source.ip": VALUES["ipBlocks"],
    "remote.ip": VALUES["remoteIpBlocks"],
    "source.namespace": VALUES["namespaces"],
    "source.principal": VALUES["principals"],
    "source.serviceAccount": VALUES["serviceAccounts"],
    "source.trustDomain": VALUES["trustDomains"],
    "destination.port": VALUES["ports"],
    "destination.ip": ["10.2.0.0/24", "10.2.0.1", "fd00:2::/64", "10.0.0.1"],
    "connection.sni": ["server.test", "*", "*.test", "s*"],
}
SOURCE = (
    "principals", "namespaces", "serviceAccounts", "trustDomains", "ipBlocks", "remoteIpBlocks", "requestPrincipals",
)  # fmt: skip
ADDRESSES = ("ipBlocks", "remoteIpBlocks")
NOT_IN_CUSTOM = ("source.namespace", "source.principal", "source.service", "source.trust", "request.auth")
OPERATION = ("methods", "paths", "hosts", "ports")


@dataclass
class PolicyGenerator:
    """Policies for servers given as (namespace, labels).

    With ``misguided`` also what Istio's webhook would refuse and istiod makes something of: keys that it does not know,
    and CUSTOM with a provider that does not exist.
    """

    rng: random.Random
    trust_domains: tuple[str, ...]
    misguided: bool = False

    def policies(self, servers: Sequence[tuple[str, dict[str, str]]], root: str) -> list[dict[str, Any]]:
        rng, found = self.rng, []
        for namespace, labels in servers:
            own = {"matchLabels": {"app": labels["app"]}}
            for _ in range(rng.choice([0, 1, 1, 2, 3])):
                found.append(self.authorization(f"p{len(found)}", namespace, own, labels["app"]))
            if rng.random() < 0.2:
                spec: dict[str, Any] = {
                    "selector": own,
                    "mtls": {"mode": rng.choice(["STRICT", "PERMISSIVE", "UNSET", "DISABLE"])},
                }
                if rng.random() < 0.5:
                    spec["portLevelMtls"] = {
                        "8081": {"mode": "STRICT"}, "9000": {"mode": "PERMISSIVE"}, "9001": {"mode": "DISABLE"},
                    }  # fmt: skip
                found.append(_policy("PeerAuthentication", f"m{len(found)}", namespace, spec))
        for namespace in (*{namespace: None for namespace, _ in servers}, root):
            if rng.random() < 0.4:
                spec = {"mtls": {"mode": rng.choice(["STRICT", "PERMISSIVE", "UNSET", "DISABLE"])}}
                found.append(_policy("PeerAuthentication", f"m{len(found)}", namespace, spec))
            for tier in "abcdef":
                if rng.random() < 0.3:
                    by_tier = {"matchLabels": {"tier": tier}}
                    found.append(self.authorization(f"t{len(found)}", namespace, by_tier, "s1"))
            for issuer in ISSUERS if namespace != root else ():
                spec = {
                    "selector": {"matchLabels": {"jwt": "yes"}}, "jwtRules": [{"issuer": issuer, "jwks": jwks()}],
                }  # fmt: skip
                found.append(_policy("RequestAuthentication", f"j{len(found)}", namespace, spec))
        return found

    def authorization(self, name: str, namespace: str, selector: dict[str, Any], server: str) -> dict[str, Any]:
        rng = self.rng
        action = rng.choice(["ALLOW", "ALLOW", "ALLOW", "DENY", "AUDIT"])
        spec: dict[str, Any] = {"action": action, "selector": selector}
        spec["rules"] = [self.rule(server) for _ in range(rng.randint(1, 2) if action == "ALLOW" else 1)]
        if action == "ALLOW" and rng.random() < 0.05:
            del spec["rules"]
        if self.misguided and rng.random() < 0.15:
            spec |= {"action": "CUSTOM", "provider": {"name": "nobody"}, "rules": [self.rule(server, in_custom=True)]}
        policy = _policy("AuthorizationPolicy", name, namespace, spec)
        if spec["action"] in ("ALLOW", "DENY") and rng.random() < 0.1:
            policy["metadata"]["annotations"] = {"istio.io/dry-run": rng.choice(["true", "T", "1", "false", "yes"])}
        return policy

    def rule(self, server: str, *, in_custom: bool = False) -> dict[str, Any]:
        rng, rule = self.rng, dict[str, Any]()
        if rng.random() < 0.45:
            names = ADDRESSES if in_custom else SOURCE
            rule["from"] = [{"source": self.clause(names, server)} for _ in range(rng.randint(1, 2))]
        if rng.random() < 0.45:
            rule["to"] = [{"operation": self.clause(OPERATION, server)} for _ in range(rng.randint(1, 2))]
        if rng.random() < 0.35:
            keys = rng.sample([key for key in sorted(WHEN) if not (in_custom and key.startswith(NOT_IN_CUSTOM))], 2)
            rule["when"] = [
                {"key": key, **self.both("values", "notValues", WHEN[key], server)} for key in keys[: rng.randint(1, 2)]
            ]
            if self.misguided and rng.random() < 0.1:
                rule["when"].append({"key": "request.unknown", "values": ["x"]})
        return rule

    def clause(self, names: tuple[str, ...], server: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.rng.sample(names, self.rng.choice([1, 1, 2])):
            found |= self.both(name, f"not{name[0].upper()}{name[1:]}", VALUES[name], server)
        if any(name.lower().endswith("serviceaccounts") for name in found):
            found = {name: values for name, values in found.items()
                     if not name.lower().endswith(("principals", "namespaces")) or "equest" in name}  # fmt: skip
        return found

    def both(self, name: str, negated: str, values: list[str], server: str) -> dict[str, list[str]]:
        """The field, its negation, or sometimes both."""
        written = self.rng.choice([(name,), (name,), (name,), (negated,), (name, negated)])
        return {each: self.some(values, server) for each in written}

    def some(self, values: list[str], server: str) -> list[str]:
        picked = self.rng.sample(values, self.rng.randint(1, min(3, len(values))))
        names = {
            "NAM*": f"{server[:-1]}*",
            "OWN": self.trust_domains[0],
            "ALIAS": self.trust_domains[-1],
            "NAME": server,
        }
        for placeholder, name in names.items():
            picked = [value.replace(placeholder, name) for value in picked]
        return picked


def _policy(kind: str, name: str, namespace: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name, "namespace": namespace}
    return {"apiVersion": "security.istio.io/v1", "kind": kind, "metadata": metadata, "spec": spec}


@lru_cache(maxsize=1)
def _key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def jwks() -> str:
    """The key set with which all issuers sign."""
    key = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(_key().public_key())) | {"kid": "k1"}
    return json.dumps({"keys": [key]})


def token(claims: dict[str, Any], *, good: bool) -> str:
    """A token with these claims; a bad one has them signed by somebody else."""
    key = _key() if good else ec.generate_private_key(ec.SECP256R1())
    return jwt.encode(claims, key, algorithm="ES256", headers={"kid": "k1"})

"""Tokens of an issuer that only tests know, and its keys for a RequestAuthentication."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm


@dataclass(frozen=True)
class Issuer:
    name: str
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def create(cls, name: str = "https://issuer.example") -> Issuer:
        return cls(name, ec.generate_private_key(ec.SECP256R1()))

    @property
    def jwks(self) -> str:
        public = json.loads(ECAlgorithm.to_jwk(self.key.public_key()))
        return json.dumps({"keys": [{**public, "kid": "e2e", "alg": "ES256", "use": "sig"}]})

    def token(self, **claims: object) -> str:
        now = int(time.time())
        everything = {"iss": self.name, "sub": "e2e", "iat": now, "exp": now + 3600, **claims}
        return jwt.encode(everything, self.key, "ES256", {"kid": "e2e"})

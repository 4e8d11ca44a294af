"""The issuer of the sample mesh: one key pair made at `demo up`, and the request tokens that clients present."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from meshbridge.demo import store
from meshbridge.demo.layout import SECRETS

ISSUER = "https://issuer.demo.meshbridge.test"
KEY_ID = "demo"
_KEY_FILE = SECRETS / "issuer.pem"


def create_issuer(path: Path = _KEY_FILE) -> dict[str, Any]:
    """A new key pair; the private half is on disk for root alone, the public half is returned as a JWKS."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    store.write(path, pem, 0o600)
    public = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(key.public_key()))
    return {"keys": [{**public, "kid": KEY_ID, "use": "sig", "alg": "ES256"}]}


def mint(claims: dict[str, Any], path: Path = _KEY_FILE, lifetime_s: int = 3600) -> str:
    """A token of the sample mesh's issuer with these claims."""
    key = load_pem_private_key(path.read_bytes(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    now = int(time.time())
    payload = {"iss": ISSUER, "sub": "demo-user", "iat": now, "exp": now + lifetime_s, **claims}
    return jwt.encode(payload, key, algorithm="ES256", headers={"kid": KEY_ID})


def request_authentication(jwks: dict[str, Any]) -> str:
    """The RequestAuthentication of the sample mesh, with its public keys written into it."""
    return f"""\
apiVersion: security.istio.io/v1
kind: RequestAuthentication
metadata:
  name: transaction-service-jwt
  namespace: finance
spec:
  selector:
    matchLabels:
      app: transaction-service
  jwtRules:
  - issuer: "{ISSUER}"
    jwks: '{json.dumps(jwks)}'
"""

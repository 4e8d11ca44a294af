"""Every row of the 2×2 table of ISTIO.md §b, under each mTLS mode and DestinationRule."""

from __future__ import annotations

import pytest

from meshbridge.bypass.halves import ClientTls, Delivered, Side, delivery
from meshbridge.policy.mesh import MtlsMode

CAPTURED, EXCLUDED, NONE = Side(True, True), Side(True, False), Side(False, False)
MTLS, PLAINTEXT, BROKEN = Delivered.MTLS, Delivered.PLAINTEXT, Delivered.BROKEN
STRICT, PERMISSIVE, DISABLE = MtlsMode.STRICT, MtlsMode.PERMISSIVE, MtlsMode.DISABLE

TABLE = {
    "both capture, STRICT": (CAPTURED, CAPTURED, STRICT, MTLS, False),
    "both capture, PERMISSIVE": (CAPTURED, CAPTURED, PERMISSIVE, MTLS, False),
    "both capture, DISABLE": (CAPTURED, CAPTURED, DISABLE, PLAINTEXT, False),
    "client captures, server excludes, STRICT: a TLS hello": (CAPTURED, EXCLUDED, STRICT, BROKEN, True),
    "client captures, server excludes, PERMISSIVE: the same": (CAPTURED, EXCLUDED, PERMISSIVE, BROKEN, True),
    "client captures, server excludes, DISABLE: plaintext gets through": (CAPTURED, EXCLUDED, DISABLE, PLAINTEXT, True),
    "client excludes, server captures, STRICT: reset": (EXCLUDED, CAPTURED, STRICT, BROKEN, True),
    "client excludes, server captures, PERMISSIVE: no identity": (EXCLUDED, CAPTURED, PERMISSIVE, PLAINTEXT, True),
    "client excludes, server captures, DISABLE": (EXCLUDED, CAPTURED, DISABLE, PLAINTEXT, True),
    "both exclude: the case to compensate": (EXCLUDED, EXCLUDED, STRICT, PLAINTEXT, False),
    "client without sidecar, server captures, STRICT": (NONE, CAPTURED, STRICT, BROKEN, False),
    "client without sidecar, server captures, PERMISSIVE": (NONE, CAPTURED, PERMISSIVE, PLAINTEXT, False),
    "client without sidecar, server excludes": (NONE, EXCLUDED, STRICT, PLAINTEXT, False),
    "server without sidecar": (CAPTURED, NONE, PERMISSIVE, PLAINTEXT, False),
}  # fmt: skip


@pytest.mark.parametrize(("client", "server", "mode", "outcome", "half"), TABLE.values(), ids=TABLE.keys())
def test_delivery(client: Side, server: Side, mode: MtlsMode, outcome: Delivered, half: bool) -> None:
    found = delivery(client, server, mode)
    assert (found.outcome, found.half) == (outcome, half)
    assert found.why
    assert bool(found.fix) == (outcome is BROKEN or (half and mode is not DISABLE) or (half and client is EXCLUDED))


def test_a_destination_rule_decides_what_the_clients_envoy_sends() -> None:
    assert delivery(CAPTURED, EXCLUDED, STRICT, ClientTls.DISABLE).outcome is PLAINTEXT
    assert delivery(CAPTURED, CAPTURED, STRICT, ClientTls.DISABLE).outcome is BROKEN
    assert delivery(CAPTURED, NONE, PERMISSIVE, ClientTls.ISTIO_MUTUAL).outcome is BROKEN
    assert delivery(CAPTURED, CAPTURED, DISABLE, ClientTls.ISTIO_MUTUAL).outcome is BROKEN
    assert delivery(EXCLUDED, CAPTURED, PERMISSIVE, ClientTls.ISTIO_MUTUAL).outcome is PLAINTEXT

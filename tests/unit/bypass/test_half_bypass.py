"""Every row of the 2×2 table of ISTIO.md §b, under each mTLS mode and DestinationRule."""

from __future__ import annotations

import pytest

from meshbridge.bypass.halves import ClientTls, Delivered, Sending, Side, delivery
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
    assert found is not None
    assert (found.outcome, found.half) == (outcome, half)
    assert found.why
    assert bool(found.fix) == (outcome is BROKEN or (half and mode is not DISABLE) or (half and client is EXCLUDED))


OFF, MUTUAL, LABEL = Sending(ClientTls.DISABLE), Sending(ClientTls.ISTIO_MUTUAL), Sending(ClientTls.LABEL)
PAST = Sending(ClientTls.DISABLE, unknown=True)
SENT = {
    "DISABLE, server excludes": (CAPTURED, EXCLUDED, STRICT, OFF, PLAINTEXT),
    "DISABLE, server captures, STRICT": (CAPTURED, CAPTURED, STRICT, OFF, BROKEN),
    "DISABLE, server captures, PERMISSIVE": (CAPTURED, CAPTURED, PERMISSIVE, OFF, PLAINTEXT),
    "ISTIO_MUTUAL, server without sidecar": (CAPTURED, NONE, PERMISSIVE, MUTUAL, BROKEN),
    "ISTIO_MUTUAL, server captures, DISABLE": (CAPTURED, CAPTURED, DISABLE, MUTUAL, BROKEN),
    "ISTIO_MUTUAL, client excludes: nobody sends it": (EXCLUDED, CAPTURED, PERMISSIVE, MUTUAL, PLAINTEXT),
    "by the label, server excludes, DISABLE: a TLS hello all the same": (CAPTURED, EXCLUDED, DISABLE, LABEL, BROKEN),
    "by the label, server captures, DISABLE": (CAPTURED, CAPTURED, DISABLE, LABEL, BROKEN),
    "by the label, server captures, STRICT": (CAPTURED, CAPTURED, STRICT, LABEL, MTLS),
    "by the label, server without sidecar": (CAPTURED, NONE, PERMISSIVE, LABEL, PLAINTEXT),
    "PassthroughCluster, server captures, STRICT": (CAPTURED, CAPTURED, STRICT, PAST, BROKEN),
    "PassthroughCluster, server captures, PERMISSIVE": (CAPTURED, CAPTURED, PERMISSIVE, PAST, PLAINTEXT),
    "PassthroughCluster, server excludes": (CAPTURED, EXCLUDED, STRICT, PAST, PLAINTEXT),
    "blocked": (CAPTURED, EXCLUDED, PERMISSIVE, Sending(blocked=True), BROKEN),
    "blocked for Envoy, which the client excludes": (EXCLUDED, EXCLUDED, STRICT, Sending(blocked=True), PLAINTEXT),
}  # fmt: skip


@pytest.mark.parametrize(("client", "server", "mode", "sending", "outcome"), SENT.values(), ids=SENT.keys())
def test_delivery_of_what_the_clients_envoy_sends(
    client: Side, server: Side, mode: MtlsMode, sending: Sending, outcome: Delivered
) -> None:
    found = delivery(client, server, mode, sending)
    assert found is not None
    assert found.outcome is outcome
    assert bool(found.fix) or outcome is not BROKEN


def test_what_tls_of_its_own_meets_is_not_decided() -> None:
    assert delivery(CAPTURED, CAPTURED, PERMISSIVE, Sending(None)) is None
    assert delivery(EXCLUDED, CAPTURED, PERMISSIVE, Sending(None)) is not None

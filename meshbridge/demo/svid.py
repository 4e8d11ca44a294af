"""Fetching a pod's certificate as its Envoy would: secrets by delta xDS, with the pod's own token."""

from __future__ import annotations

import os
import queue
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from envoy.config.core.v3.base_pb2 import Node
from envoy.extensions.transport_sockets.tls.v3.secret_pb2 import Secret
from envoy.service.discovery.v3 import ads_pb2_grpc
from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest

from meshbridge.demo import credentials, store
from meshbridge.demo.errors import DemoError
from meshbridge.demo.layout import APPLICATION_UID, CONTROLLER_SOCKET, SECRETS
from meshbridge.demo.records import PodRecord
from meshbridge.xds.bearer import bearer
from meshbridge.xds.names import SECRET_CERTIFICATE, SECRET_ROOT_CA
from meshbridge.xds.types import SECRET

_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """Paths of a chain, its key and the mesh's root, readable for one pod's application."""

    certificate: Path
    key: Path
    root: Path


def fetch(owner: PodRecord, holder: PodRecord) -> CertificateFiles:
    """Write the certificate of ``owner`` where the application of ``holder`` can read it.

    Raises:
        DemoError: The controller does not give it.
    """
    secrets = _secrets(owner)
    prefix = f"svid-{holder.namespace}_{holder.name}-as-{owner.namespace}_{owner.name}"
    certificate = secrets[SECRET_CERTIFICATE].tls_certificate
    files = CertificateFiles(*(SECRETS / f"{prefix}.{kind}.pem" for kind in ("cert", "key", "root")))
    contents = (
        certificate.certificate_chain.inline_bytes,
        certificate.private_key.inline_bytes,
        secrets[SECRET_ROOT_CA].validation_context.trusted_ca.inline_bytes,
    )
    for path, content in zip((files.certificate, files.key, files.root), contents, strict=True):
        store.write(path, content, 0o600)
        os.chown(path, APPLICATION_UID, APPLICATION_UID)
    return files


def _secrets(owner: PodRecord) -> dict[str, Any]:
    wanted = (SECRET_CERTIFICATE, SECRET_ROOT_CA)
    request = DeltaDiscoveryRequest(node=Node(id=owner.key), type_url=SECRET, resource_names_subscribe=wanted)
    done: queue.SimpleQueue[None] = queue.SimpleQueue()

    def requests() -> Iterator[DeltaDiscoveryRequest]:
        yield request
        done.get()  # the stream ends when this does

    found: dict[str, Any] = {}
    options = [("grpc.default_authority", "localhost")]
    with grpc.insecure_channel(f"unix:{CONTROLLER_SOCKET}", options=options) as channel:
        stub = ads_pb2_grpc.AggregatedDiscoveryServiceStub(channel)
        metadata = bearer(credentials.pod_token(owner))
        try:
            for response in stub.DeltaAggregatedResources(requests(), metadata=metadata, timeout=_TIMEOUT_S):
                for resource in response.resources:
                    found[resource.name] = Secret.FromString(resource.resource.value)
                if all(name in found for name in wanted):
                    return found
        except grpc.RpcError as error:
            raise DemoError(f"no certificate from the controller: {error}", where=f"pod {owner.key}") from error
        finally:
            done.put(None)
    raise DemoError("the controller ended the stream without a certificate", where=f"pod {owner.key}")

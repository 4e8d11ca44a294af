"""``meshbridge evaluate``: what policies make of flows, in bulk and with nothing running."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import BinaryIO

import click

from meshbridge.cli.documents import DocumentSource, document_options, mesh_settings
from meshbridge.cli.files import STDIN
from meshbridge.cli.observe import print_lines
from meshbridge.evaluation.batch import MAX_LINE_BYTES, answer_lines
from meshbridge.evaluation.cluster import Cluster
from meshbridge.observe.text import printable

NOT_ALL_ANSWERED = 3


@click.command(name="evaluate", context_settings={"help_option_names": ["-h", "--help"]})
@document_options
@click.option(
    "--flows", type=click.File("rb"), required=True, metavar="FLOWS.jsonl",
    help="The flows to ask about, one JSON object per line; - is standard input.",
)  # fmt: skip
@click.option("-o", "--output", type=click.Choice(["jsonl"]), default="jsonl", show_default=True, expose_value=False)
def command(documents: DocumentSource, flows: BinaryIO) -> None:
    """Answer what happens to flows under the policies of the cluster, or of manifests, with nothing running.

    A flow has dst ("ns/pod", an address, or {"namespace", "labels"}), port, protocol (TCP), src ("ns/pod", an address,
    "node/NAME", "entity:world"), and where given src_ip, dst_ip, remote_ip, sni, peer_principal (null: plaintext),
    app_protocol, http {method, path, host, headers}, claims, token (absent, valid, bad), proxy (sidecar, ztunnel,
    none), interface (of the pods: eth0), src_uid (the sending process's: an application's). For ICMP the port is the
    type. The answer is the flow with network, mesh, path, delivery, kernel, verdict and reasons; a line that cannot be
    answered comes back with an error.

    delivery is what the two ends' sidecars make of a TCP connection, whatever policies say: mtls, plaintext, broken
    (nothing arrives, or a TLS hello: DENY), or null where nobody can tell. A pod is reached by the Services in front of
    it; one that is asked about by its address, by that address, which Istio's sidecars send plaintext.

    \b
    Examples:
      meshbridge evaluate --flows flows.jsonl
      meshbridge evaluate --context staging --flows flows.jsonl
      meshbridge evaluate -f manifests/ --flows flows.jsonl
      echo '{"src": "shop/web", "dst": "shop/api", "port": 8080}' | meshbridge evaluate -f manifests/ --flows -
      meshbridge evaluate -f manifests/ --flows flows.jsonl | jq -c 'select(.verdict == "DENY")'
    \b
    Exit codes: 0 every flow is answered, 1 a manifest or the cluster cannot be read, 3 some lines hold an error.
    """
    if STDIN in documents.files and getattr(flows, "name", "<stdin>") == "<stdin>":
        raise click.UsageError("--filename and --flows cannot both be standard input")
    objects = documents.read()
    cluster = Cluster(objects, mesh_settings(objects))
    for refusal in cluster.policies.refusals:
        click.echo(f"Warning: refused: {printable(str(refusal))}", err=True)
    unanswered = 0

    def answers() -> Iterator[str]:
        nonlocal unanswered
        for line in answer_lines(cluster, _lines(flows)):
            unanswered += not line.answered
            yield json.dumps(line.record, separators=(",", ":"))

    print_lines(answers())
    if unanswered:
        sys.exit(NOT_ALL_ANSWERED)


def _lines(flows: BinaryIO) -> Iterator[bytes]:
    """The lines; of one that is too long no more than shows that it is."""
    while line := flows.readline(MAX_LINE_BYTES + 1):
        yield line
        while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = flows.readline(MAX_LINE_BYTES + 1)

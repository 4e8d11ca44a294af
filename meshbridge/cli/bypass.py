"""``meshbridge bypass``: which flows Envoy does not see, what that loses, what stands in, and what will break."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import click

from meshbridge.bypass.automatic import automatic_exclusions, is_automatic, with_automatic
from meshbridge.bypass.inventory import inventory
from meshbridge.bypass.record import automatic_record, merged_records, report_record
from meshbridge.bypass.report import report
from meshbridge.cli import bypassaudit, bypassfix, bypasspromote
from meshbridge.cli.agents import answering
from meshbridge.cli.documents import mesh_settings
from meshbridge.cli.files import ManifestError, read_manifests
from meshbridge.cli.observe import print_lines
from meshbridge.cli.observedflows import observed_option, read_observed
from meshbridge.observe.client import find_agents
from meshbridge.observe.tables import aligned
from meshbridge.observe.text import printable
from meshbridge.policy.model import Document

SOMETHING_BREAKS = 3
NOT_ACCEPTED = 4
_OTHERWISE = {
    "deny": "refused at admission",
    "warn": "compensated, with a warning",
    "compensate": "compensated",
}
_FATES = ("lost", "weakened", "kept")

_files = click.option(
    "-f",
    "--filename",
    "files",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    help="Manifests (a file, or a directory of them) to judge in place of what runs. May be repeated.",
)
_output = click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
_node = click.option("--node", metavar="NAME", help="Only this node's agent.")
_socket = click.option("--socket", type=click.Path(path_type=Path), help="Socket of one agent.")
_namespace = click.option("-n", "--namespace", metavar="NS", help="Only pods of this namespace.")


@click.group(name="bypass", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Which flows bypass the sidecar, what that loses, and what stands in for it."""


@command.command(name="list")
@_namespace
@click.option("-a", "--all", "everything", is_flag=True, help="Also what no mesh policy ever guards, and tunnels.")
@_files
@observed_option
@_output
@_node
@_socket
def list_bypasses(
    namespace: str | None,
    everything: bool,
    files: tuple[Path, ...],
    observed: BinaryIO | None,
    output: str,
    node: str | None,
    socket: Path | None,
) -> None:
    """List bypassed ports: pod, ports, direction, route, what is lost or weakened, and what stands in.

    Half bypasses are told of clients of which something says that they use the port: Services, policies, exclusions,
    and connections that were seen: by the agents themselves, with -f those of --observed.

    \b
    Examples:
      meshbridge bypass list
      meshbridge bypass list -n finance -o json | jq '.bypasses[] | select(.compensation.enforced | not)'
      meshbridge bypass list -f manifests/
      meshbridge observe -o json > flows.jsonl; meshbridge bypass list -f manifests/ --observed flows.jsonl
    \b
    Exit codes: 0 shown, 1 no agent answers or a manifest cannot be read.
    """
    record = _record(files, node, socket, observed=observed)
    record = _selected(record, lambda pod: namespace is None or pod.partition("/")[0] == namespace)
    rows = [row for row in record["bypasses"] if everything or row["class"] == "excluded"]
    if output == "json":
        print_lines([json.dumps({**record, "bypasses": rows}, indent=2)])
        return
    print_lines(_list_lines(rows, record))


@command.command(name="show")
@click.argument("pod", metavar="NAMESPACE/POD")
@_files
@observed_option
@_output
@_node
@_socket
def show(
    pod: str,
    files: tuple[Path, ...],
    observed: BinaryIO | None,
    output: str,
    node: str | None,
    socket: Path | None,
) -> None:
    """Show one pod: every port that Envoy does not see, each guarantee with its fate, and whom the kernel lets in.

    \b
    Examples:
      meshbridge bypass show finance/ledger
      meshbridge bypass show monitoring/prometheus -f prometheus-deployment.yaml
    \b
    Exit codes: 0 shown, 1 there is no such pod, no agent answers or a manifest cannot be read.
    """
    record = _record(files, node, socket, observed=observed)
    known = {item["pod"] for key in ("bypasses", "findings", "isolations") for item in record[key]}
    if pod not in known | set(record["not_starting"]) | {half["server"] for half in record["half_bypasses"]}:
        raise ManifestError(
            "nothing is known of this pod: it does not exist here, or Envoy sees all of its traffic",
            where=f"pod {printable(pod)}",
            fix="'meshbridge bypass list --all' shows the pods there are",
        )
    record = _selected(record, lambda name: name == pod)
    if output == "json":
        print_lines([json.dumps(record, indent=2)])
        return
    print_lines(_show_lines(pod, record))


@command.command(name="plan")
@_files
@click.option(
    "--with",
    "context",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    metavar="FILE|DIR",
    help="Manifests of what is in force already: judged together, told of only where it meets the pods of -f.",
)
@observed_option
@_output
@_node
@_socket
def plan(
    files: tuple[Path, ...],
    context: tuple[Path, ...],
    observed: BinaryIO | None,
    output: str,
    node: str | None,
    socket: Path | None,
) -> None:
    """Say what will happen before it does: what bypasses lose, what of it nobody accepted, what breaks.

    What is lost has to be accepted by a BypassPolicy among the objects. The injector's sidecar is taken as given, and
    so are the exclusions that a template annotated 'meshbridge.io/bypass: auto' will get.

    \b
    Examples:
      meshbridge bypass plan -f deployment.yaml -f bypass-policy.yaml
      meshbridge bypass plan -f deployment.yaml --with manifests/
      meshbridge bypass plan -f manifests/ -o json | jq '.bypasses[].ruling'
    \b
    Exit codes: 0 nothing breaks and what is lost is accepted, 3 something breaks (a connection, a port that stops
    working, a pod that never starts), 4 something is lost that nobody accepted, 1 no agent answers or a manifest
    cannot be read.
    """
    record = _record(files, node, socket, context, observed)
    rows = [row for row in record["bypasses"] if row["class"] == "excluded"]
    if output == "json":
        print_lines([json.dumps(record, indent=2)])
    else:
        print_lines([*_list_lines(rows, record), *_ruling_lines(rows), *_automatic_lines(record)])
    broken = any(half["delivery"] == "broken" for half in record["half_bypasses"])
    closed = any(port["closed"] for isolation in record["isolations"] for port in isolation["ports"])
    if broken or closed or record["not_starting"]:
        sys.exit(SOMETHING_BREAKS)
    if any(row["ruling"]["unaccepted"] or not row["ruling"]["allowed"] for row in rows):
        sys.exit(NOT_ACCEPTED)


command.add_command(bypassaudit.command)
command.add_command(bypassfix.command)
command.add_command(bypasspromote.command)


def _ruling_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is lost and nobody accepted, and what BypassPolicies therefore do."""
    lines: list[str] = []
    for row in rows:
        ruling = row["ruling"]
        subject = f"{row['pod']} {row['direction']} TCP {ports_text(row['ports'])}"
        by = ", ".join(origin["name"] for origin in ruling["policies"]) or "no BypassPolicy selects the pod"
        if not ruling["allowed"]:
            lines.append(
                f"✗ {printable(subject)}: {_OTHERWISE[ruling['otherwise']]}: no route of {printable(by)} is this"
            )
        elif ruling["unaccepted"]:
            kinds = ", ".join(dict.fromkeys(guarantee["kind"] for guarantee in ruling["unaccepted"]))
            what = f"loses {kinds}, which nobody accepted ({by})"
            lines.append(f"✗ {printable(subject)}: {_OTHERWISE[ruling['otherwise']]}: {printable(what)}")
        elif ruling["policies"]:
            lines.append(f"✓ {printable(subject)}: accepted by {printable(by)}")
        lines += [f"  {printable(note)}" for note in ruling["notes"]]
    return [*([""] if lines else []), *lines]


def _automatic_lines(record: dict[str, Any]) -> list[str]:
    """What ``meshbridge.io/bypass: auto`` comes to."""
    lines: list[str] = []
    for item in record.get("automatic", ()):
        for name, value in item["annotations"].items():
            lines.append(f"auto: {printable(item['pod'])} gets {name}: {printable(value)}")
        for refused in item["refused"]:
            what = f"{refused['direction']} {refused['port']} stays with Envoy: {refused['why']}"
            lines.append(f"auto: {printable(item['pod'])} {printable(what)}")
    return [*([""] if lines else []), *lines]


def _record(
    files: Sequence[Path],
    node: str | None,
    socket: Path | None,
    context: Sequence[Path] = (),
    observed: BinaryIO | None = None,
) -> dict[str, Any]:
    if observed is not None and not files:
        raise click.UsageError("--observed goes with --filename: agents count the connections that they saw themselves")
    if not files:
        return merged_records(json.loads(agent.bypasses()) for agent in answering(find_agents(socket, node)))
    given = read_manifests(files)
    keys = {document.key for document in given}
    objects = [*given, *(d for d in read_manifests(context) if d.key not in keys)]
    found = inventory(objects, mesh=mesh_settings(objects), now=datetime.now(UTC))
    found = replace(found, observed=read_observed(observed))
    automatic = [
        automatic_record(workload.key, automatic_exclusions(workload, found))
        for workload in found.workloads
        if is_automatic(workload) and not workload.addresses
    ]
    record = {**report_record(report(with_automatic(found))), "automatic": automatic}
    return _selected(record, _concerned(given, record)) if context else record


def _concerned(given: Iterable[Document], record: dict[str, Any]) -> Callable[[str], bool]:
    """Whether a pod is among the given objects, or isolated by a policy among them."""
    named = {(document.kind, document.namespace, document.name) for document in given}
    pods = {f"{namespace}/{name}" for _, namespace, name in named}
    for isolation in record["isolations"]:
        origin = isolation["origin"]
        if (origin["kind"], origin["namespace"], origin["name"]) in named:
            pods.add(isolation["pod"])
    return pods.__contains__


def _selected(record: dict[str, Any], wanted: Callable[[str], bool]) -> dict[str, Any]:
    """The record of some pods only."""
    by_pod = ("bypasses", "findings", "isolations")
    kept = {key: [item for item in record[key] if wanted(item["pod"])] for key in by_pod}
    halves = [h for h in record["half_bypasses"] if wanted(h["server"]) or any(map(wanted, h["clients"]))]
    automatic = [item for item in record.get("automatic", ()) if wanted(item["pod"])]
    proofs = [item for item in record.get("proofs", ()) if wanted(item["pod"])]
    return {
        **kept,
        "proofs": proofs,
        "automatic": automatic,
        "half_bypasses": halves,
        "not_starting": [pod for pod in record["not_starting"] if wanted(pod)],
    }


def ports_text(ranges: Iterable[Sequence[int]]) -> str:
    """``80,8080-8090``, and ``all others`` in place of what nobody reads."""
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)
    return text if len(text) <= 40 else f"{text[: text.rfind(',', 0, 36)]},…"


def _list_lines(rows: Sequence[dict[str, Any]], record: dict[str, Any]) -> list[str]:
    table = [("POD", "PORTS", "DIRECTION", "ROUTE", "CLASS", "LOST", "WEAKENED", "STANDS IN")]
    for row in rows:
        fates = {fate: _kinds(row, fate) for fate in _FATES}
        stands_in = _stands_in(row)
        where = f" to {','.join(row['destinations'])}" if row["destinations"] else ""
        table.append(
            (
                printable(row["pod"]),
                ports_text(row["ports"]) + where,
                row["direction"],
                row["route"]["kind"],
                row["class"],
                fates["lost"],
                fates["weakened"],
                stands_in,
            )
        )
    lines = aligned(table) if rows else ["No port that Envoy would guard bypasses it."]
    return [*lines, *_warnings(record)]


def _kinds(row: dict[str, Any], fate: str) -> str:
    kinds = dict.fromkeys(g["kind"] for g in row["guarantees"] if g["fate"] == fate)
    return ",".join(kinds) or "-"


def _warnings(record: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for pod in record["not_starting"]:
        lines.append(f"! {printable(pod)} is refused or never starts")
    for finding in record["findings"]:
        fix = f"; {finding['fix']}" if finding["fix"] else ""
        text = f"{finding['subject']}: {finding['what']}{fix}"
        pod = "" if finding["pod"] in finding["subject"] else f"pod {finding['pod']}, "
        lines.append(f"! {finding['severity']} {finding['code']}: {printable(pod + text)}")
    for half in record["half_bypasses"]:
        via = f" through {half['via']}" if half["via"] else ""
        fix = f"; fix: {half['fix']}" if half["fix"] else ""
        clients = _names(half["clients"])
        known = f" (known from: {', '.join(_known_from(half))})" if half.get("known_from") else ""
        text = f"{clients} → {half['server']}:{half['port']}{via}: {half['delivery']}: {half['why']}{fix}{known}"
        lines.append(f"! {'half bypass' if half['half'] else 'both sides through Envoy'}: {printable(text)}")
    for isolation in record["isolations"]:
        lines.append(f"! default deny: {printable(_isolation(isolation))}")
    return [*([""] if lines else []), *lines]


def _known_from(half: dict[str, Any]) -> Iterable[str]:
    """What says that the clients use the port; of a connection that was seen also when, in the local time."""
    for source in half["known_from"]:
        if source == "observed" and half.get("observed_unix_ns"):
            seen = datetime.fromtimestamp(half["observed_unix_ns"] / 1e9, UTC).astimezone()
            yield f"observed {seen:%b %d %H:%M:%S}"
        else:
            yield source


def _isolation(isolation: dict[str, Any]) -> str:
    parts = []
    for port in isolation["ports"]:
        name = f" ({port['name']})" if port["name"] else ""
        lost, kept = port["sources_lost_count"], port["sources_kept_count"]
        effect = "stops working" if port["closed"] else f"loses {lost} of {lost + kept} known sources"
        probes = ", but for probes of its own node" if port["closed"] and port["probed"] else ""
        parts.append(f"{port['port']}/{port['protocol']}{name} {effect}{probes}")
    return f"{isolation['policy']} isolates {isolation['pod']}: {'; '.join(parts)}"


def _names(names: Sequence[str], limit: int = 5) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _show_lines(pod: str, record: dict[str, Any]) -> list[str]:
    lines = [f"Pod {printable(pod)}", *map(_proof_line, record["proofs"])]
    for row in record["bypasses"]:
        where = f" to {', '.join(row['destinations'])}" if row["destinations"] else ""
        families = "+".join(row["families"])
        lines += [
            "",
            f"{row['direction']} TCP {ports_text(row['ports'])}{where} ({families}): {row['class']}",
            f"  route      {printable(_route(row['route']))}",
        ]
        if row["compensation"]:
            lines += _compensation_lines(row)
        if row["guarantees"]:
            table = [("  GUARANTEE", "FATE", "WHAT IT WAS", "WHAT STANDS IN")]
            table += [
                (f"  {g['kind']}", g["fate"], printable(g["what"]), printable(g["stands_in"]))
                for fate in _FATES
                for g in row["guarantees"]
                if g["fate"] == fate
            ]
            lines += aligned(table)
    return [*lines, *_warnings(record)]


def _proof_line(proof: dict[str, Any]) -> str:
    words = {"True": "Enforced", "False": "not Enforced"}.get(proof["status"], "Enforced unknown")
    text = f"{words} ({proof['reason']}): {proof['message']}"
    return f"  proof      {printable(text)}"


def _route(route: dict[str, Any]) -> str:
    return f"{route['kind']}: {route['detail']}" if route["detail"] else route["kind"]


def _stands_in(row: dict[str, Any]) -> str:
    """What the kernel does there; under audit, what it only says that it would."""
    compensation = row["compensation"]
    if compensation is None:
        return "-"
    audited = compensation["enforced"] and row["ruling"] and row["ruling"]["mode"] == "audit"
    return f"audit only: {compensation['summary']}" if audited else str(compensation["summary"])


def _compensation_lines(row: dict[str, Any]) -> list[str]:
    compensation = row["compensation"]
    lines = [f"  stands in  {_stands_in(row)}"]
    if compensation["enforced"]:
        lines.append(f"  why        {printable(compensation['why'])}")
    for title, key in (("lets in", "allowed"), ("refuses", "refused"), ("passes", "weakened")):
        if compensation[key]:
            lines.append(f"  {title:<9}  {printable(_names(compensation[key], 20))}")
    return lines

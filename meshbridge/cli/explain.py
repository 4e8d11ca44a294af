"""``meshbridge explain``: everybody on a flow's way, what each of them says and why, and which rule came close."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, Final

import click

from meshbridge.cli.documents import DocumentSource, document_options, mesh_settings
from meshbridge.cli.observe import print_lines
from meshbridge.errors import MeshBridgeError
from meshbridge.evaluation.cluster import Cluster, Party
from meshbridge.evaluation.explanation import Explanation, Step, explain_flow
from meshbridge.evaluation.explanation_network import Near
from meshbridge.evaluation.explanation_record import explanation_record
from meshbridge.evaluation.question import PROTOCOLS, QuestionError, parse_question
from meshbridge.identity.model import ProxyClass
from meshbridge.observe.text import printable
from meshbridge.policy.model import Origin, Verdict

EXIT_CODES: Final = {Verdict.ALLOW: 0, Verdict.DENY: 1, Verdict.NEEDS_L7: 3}
NOT_EXPLAINED: Final = 2
WIDTH: Final = 100

_COLOURS: Final = {"ALLOW": "green", "DENY": "red", "NEEDS_L7": "yellow", "bypassed": "yellow", "broken": "red"}
_COLUMN: Final = 11
_OPTION_FOR: Final = {
    "src": "--from", "dst": "--to", "port": "--to", "remote_ip": "--remote-ip", "claims": "--claim",
    "http.headers": "--header", "peer_principal": "--principal",
}  # fmt: skip
_OPTION_OF: Final = {
    "source.ip": "--from", "remote.ip": "--remote-ip", "source.": "--principal", "methods": "--method",
    "paths": "--path", "hosts": "--host", "request.headers": "--header", "request.auth": "--claim or --token",
    "connection.sni": "--sni",
}  # fmt: skip


@click.command(name="explain", context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--from", "source", required=True, metavar="SOURCE", help="NS/POD, an address, node/NAME, entity:world.")
@click.option(
    "--to", "destination", required=True, metavar="DESTINATION:PORT",
    help="NS/POD:PORT or ADDRESS:PORT (of a pod, a Service or anybody); for ICMP the port is the type.",
)  # fmt: skip
@click.option(
    "--protocol", type=click.Choice(list(PROTOCOLS), case_sensitive=False), default="TCP", show_default=True,
)  # fmt: skip
@click.option(
    "--principal", metavar="SPIFFE|none", help="What the source presents; none is plaintext.  [whatever it may]"
)
@click.option("--method", metavar="METHOD", help="Of the HTTP request.")
@click.option("--path", metavar="PATH", help="Of the HTTP request, as it is sent.")
@click.option("--host", metavar="HOST", help="Of the HTTP request.")
@click.option("--header", "headers", multiple=True, metavar="NAME=VALUE", help="Of the HTTP request. May be repeated.")
@click.option("--claim", "claims", multiple=True, metavar="NAME=VALUE", help="Of a valid token; repeated: a list.")
@click.option("--token", type=click.Choice(["absent", "valid", "bad"]), help="The request's token.")
@click.option("--sni", metavar="NAME", help="The server's name that the client asks for.")
@click.option("--remote-ip", metavar="ADDRESS", help="Whom Envoy takes for the client behind proxies.")
@click.option("--app-protocol", type=click.Choice(["http", "tcp", "auto"]), help="What Envoy takes the port for.")
@document_options
@click.option("-a", "--all", "everything", is_flag=True, help="All rules that came close, not only the nearest.")
@click.option("-o", "--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.pass_context
def command(ctx: click.Context, /, documents: DocumentSource, everything: bool, output: str, **asked: Any) -> None:
    """Explain one flow: each layer in the order a packet meets it, its verdict, the rule that gave it by file and line,
    the nearest rule that would have changed it, and why that one did not match.

    It reads the cluster; with -f it needs nothing running. What is left unsaid stays open, as in 'meshbridge evaluate':
    a source may present any name or none. The verdict if it presents its own is told beside it.

    \b
    Examples:
      meshbridge explain --from finance/client --to finance/transaction-service:8080
      meshbridge explain --from shop/web --to shop/api:8080 --method GET --path /v1/orders --claim scope=read
      meshbridge explain --from entity:world --to 10.96.0.1:443 -f manifests/ --all
      meshbridge explain --from 192.0.2.7 --to shop/api:8080 --principal none -o json | jq .verdict
    \b
    Exit codes: 0 ALLOW, 1 DENY, 2 it cannot be explained, 3 NEEDS_L7: it depends on what was not said.
    """
    try:
        flow = _flow(**asked)
        objects = documents.read()
        explanation = explain_flow(Cluster(objects, mesh_settings(objects)), parse_question(flow))
    except MeshBridgeError as error:
        if (ctx.obj or {}).get("debug"):
            raise
        error.where = _OPTION_FOR.get(error.where, error.where)
        click.echo(f"Error: {printable(str(error))}", err=True)
        sys.exit(NOT_EXPLAINED)
    if output == "json":
        print_lines([json.dumps({"flow": flow, **explanation_record(explanation)}, indent=2)])
    else:
        print_lines(explanation_lines(explanation, everything=everything, width=_width(), colours=_colours()))
    sys.exit(EXIT_CODES[explanation.verdict])


def _flow(
    source: str, destination: str, protocol: str, principal: str | None, headers: Iterable[str], claims: Iterable[str],
    **said: str | None,
) -> dict[str, Any]:  # fmt: skip
    """The flow as ``meshbridge evaluate`` takes it.

    Raises:
        QuestionError: an option's value cannot be used.
    """
    name, colon, port = destination.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit():
        raise QuestionError(
            f"{destination[:120]!r} names no port", where="--to", fix="write NS/POD:PORT or ADDRESS:PORT"
        )
    flow: dict[str, Any] = {
        "src": source, "dst": name.removeprefix("[").removesuffix("]"), "port": int(port), "protocol": protocol.upper(),
    }  # fmt: skip
    if principal is not None:
        flow["peer_principal"] = None if principal == "none" else principal
    flow |= {key: said[key] for key in ("sni", "remote_ip", "app_protocol") if said[key] is not None}
    http: dict[str, Any] = {key: said[key] for key in ("method", "path", "host") if said[key] is not None}
    if pairs := _pairs(headers, "--header"):
        http["headers"] = {key: ",".join(values) for key, values in pairs.items()}
    if http:
        flow["http"] = http
    if pairs := _pairs(claims, "--claim"):
        flow["claims"] = {key: values[0] if len(values) == 1 else values for key, values in pairs.items()}
    if said["token"] is not None:
        flow["token"] = said["token"]
    return flow


def _pairs(texts: Iterable[str], option: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise QuestionError(f"{text[:120]!r} has no '='", where=option, fix="write NAME=VALUE")
        found.setdefault(name, []).append(value)
    return found


def _width() -> int:
    return min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns) if sys.stdout.isatty() else WIDTH


def _colours() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def explanation_lines(
    explanation: Explanation, *, everything: bool = False, width: int = WIDTH, colours: bool = False
) -> Iterator[str]:
    """The explanation for a person: one block for each step, and one line of verdict at the end."""
    page = _Page(max(width, 2 * _COLUMN), colours)
    yield from page.block("from", _party(explanation.source))
    to = f"{_party(explanation.destination)}, port {explanation.port}"
    if explanation.frontend is not None:
        services = ", ".join(f"{service.namespace}/{service.name}" for service in explanation.frontend.services)
        yield from page.block("to", printable(f"{explanation.frontend.name}, Service {services}"))
        to = f"{to}: of {explanation.legs} behind it the one treated most strictly" if explanation.legs > 1 else to
    yield from page.block("behind it" if explanation.frontend is not None else "to", to)
    yield ""
    reached = True
    for number, step in enumerate(explanation.steps, 1):
        yield from _step_lines(page, number, step, reached=reached, everything=everything)
        reached = reached and step.verdict is not Verdict.DENY
    yield ""
    for refusal in explanation.refusals:
        yield from page.block("refused", printable(str(refusal)))
    if (own := explanation.as_itself) is not None:
        who = f"presenting {own.principal}" if own.principal else "in plaintext"
        yield from page.block("note", printable(f"the source's own proxy makes it {own.verdict.name}, {who}"))
    yield page.painted(explanation.verdict.name) + _conclusion(explanation)


def _conclusion(explanation: Explanation) -> str:
    match explanation.verdict:
        case Verdict.ALLOW:
            return "every policy on its way lets it pass"
        case Verdict.NEEDS_L7:
            return "it passes in the kernel; the rest depends on what was not said"
        case Verdict.DENY:
            return f"stopped by {explanation.decided_by}"


class _Page:
    """Text in two columns: a word, and what there is to say."""

    def __init__(self, width: int, colours: bool) -> None:
        self._width, self._colours = width, colours

    def painted(self, word: str) -> str:
        cell = word.ljust(_COLUMN)
        colour = _COLOURS.get(word)
        return click.style(word, fg=colour, bold=True) + cell[len(word) :] if self._colours and colour else cell

    def block(self, word: str, text: str, indent: int = 0) -> Iterator[str]:
        lines = textwrap.wrap(
            text, self._width - _COLUMN - indent, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        for number, line in enumerate(lines or [""]):
            yield (self.painted(word) if number == 0 else " " * _COLUMN) + " " * indent + line


def _step_lines(page: _Page, number: int, step: Step, *, reached: bool, everything: bool) -> Iterator[str]:
    word = step.verdict.name if step.verdict is not None else step.outcome
    names = [] if len(step.origins) > 1 else [printable(str(origin)) for origin in step.origins]
    aside = "" if reached else " (not reached)"
    yield from page.block(word, printable(" ".join([f"{number}. {step.stage}{aside}: {step.text}", *names])))
    if len(step.origins) > 1:
        yield from _listed(page, step.origins, everything=everything)
    for near in step.open if everything else step.open[:3]:
        yield from _open_lines(page, near, judged=step.verdict is Verdict.NEEDS_L7)
    found = step.near or ()
    for place, near in enumerate(found if everything else found[:1]):
        yield from _near_lines(page, "nearest" if place == 0 else "near", near)
    if step.without not in (None, Verdict.DENY):
        rules = "that rule" if len(step.origins) == 1 else "those rules"
        yield from page.block("without", f"{rules} it would be {step.without.name}")
    elif step.verdict is Verdict.DENY and step.near == ():
        yield from page.block("nearest", "none: no single rule would change it by matching")
    if not everything and (more := max(len(found) - 1, 0) + max(len(step.open) - 3, 0)):
        yield from page.block("", f"{more} more with --all", indent=2)


def _listed(page: _Page, origins: tuple[Origin, ...], *, everything: bool) -> Iterator[str]:
    shown = origins if everything else origins[:5]
    for origin in shown:
        yield from page.block("", printable(str(origin)), indent=2)
    if len(shown) < len(origins):
        yield from page.block("", f"and {len(origins) - len(shown)} more", indent=2)


def _near_lines(page: _Page, word: str, near: Near) -> Iterator[str]:
    if near.isolates:
        would = "would select the pod, and nothing it says allows the flow"
    else:
        would = {
            Verdict.ALLOW: "would allow it", Verdict.DENY: "would deny it", Verdict.NEEDS_L7: "would leave it to L7",
        }[near.verdict]  # fmt: skip
    yield from page.block(word, printable(f"{near.origin} {would}, but"))
    for miss in near.mismatches:
        yield from page.block("", printable(f"it wants {miss.wants}: the {miss.of} {miss.has}"), indent=4)
    if near.depends:
        yield from page.block("", printable(f"and it depends on {'; '.join(near.depends)}"), indent=4)


def _open_lines(page: _Page, near: Near, *, judged: bool) -> Iterator[str]:
    would = "allows it" if near.verdict is Verdict.ALLOW else "denies it"
    options = {option for text in near.depends for start, option in _OPTION_OF.items() if text.startswith(start)}
    hint = f" (say it with {', '.join(sorted(options))})" if options and judged else ""
    yield from page.block("depends", printable(f"{near.origin} {would} given {'; '.join(near.depends)}{hint}"))


def _party(party: Party) -> str:
    """An end in a few words."""
    workload = party.workload
    parts = [str(party.address)] if party.address is not None and str(party.address) != party.name else []
    if workload is not None:
        proxy = "no sidecar" if workload.proxy is ProxyClass.NONE else workload.proxy.value
        parts += ["on its node's network"] if workload.host_network else [proxy]
        labels = ",".join(f"{key}={value}" for key, value in sorted(workload.labels.items()))
        parts += [f"labels {labels}"] if labels else []
    parts += [f"node {party.node}"] if party.node else []
    parts += [", ".join(sorted(party.entities))] if party.entities else []
    return printable(f"{party.name} ({'; '.join(parts)})" if parts else party.name)

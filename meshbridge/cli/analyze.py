"""``meshbridge analyze``: what is wrong, risky or in vain in policies and pods, before or after they are applied."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click
import yaml

from meshbridge import __version__
from meshbridge.analysis.analyze import ANALYZERS, analyze
from meshbridge.analysis.codes import CODES, DOCUMENTATION
from meshbridge.analysis.finding import Finding, finding, in_order, reaches
from meshbridge.analysis.record import finding_record, place, sarif
from meshbridge.analysis.suppression import Suppression, kept
from meshbridge.cli.documents import (
    DocumentSource,
    context_option,
    files_option,
    istio_namespace_option,
    kubeconfig_option,
    mesh_settings,
)
from meshbridge.cli.files import ManifestError, manifest_files, read_manifest
from meshbridge.cli.observe import print_lines
from meshbridge.controller.meshconfig import MeshConfigError
from meshbridge.kube.yaml import YamlError
from meshbridge.observe.tables import aligned
from meshbridge.observe.text import printable
from meshbridge.policy.mesh import DEFAULT_MESH, MeshSettings
from meshbridge.policy.model import Document, Origin, Severity

UNREADABLE: Final = 65
FOUND_ISSUES: Final = 79
"""The exit codes of ``istioctl analyze``."""

_COLOURS: Final = {Severity.WARNING: "yellow", Severity.ERROR: "red"}
_LEVELS: Final = click.Choice([severity.value for severity in Severity], case_sensitive=False)


@click.command(name="analyze", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("paths", nargs=-1, metavar="[FILE|DIR]...", type=click.Path(exists=True, path_type=Path))
@files_option
@kubeconfig_option
@context_option
@istio_namespace_option
@click.option(
    "-n", "--namespace", "namespaces", multiple=True, metavar="NS",
    help="Show only findings about this namespace and about cluster-wide objects. May be repeated.",
)  # fmt: skip
@click.option("-A", "--all-namespaces", is_flag=True, help="Show findings about all namespaces, which is the default.")
@click.option("-o", "--output", type=click.Choice(["text", "json", "yaml", "sarif"]), default="text", show_default=True)
@click.option(
    "--failure-threshold", type=_LEVELS, default="error", show_default=True,
    help="The severity from which on findings make the command fail.",
)  # fmt: skip
@click.option(
    "--output-threshold", type=_LEVELS, default="info", show_default=True,
    help="The severity from which on findings are shown.",
)  # fmt: skip
@click.option(
    "-S", "--suppress", multiple=True, metavar="CODE=OBJECT",
    help='Leave out a code for an object: "MB0401=shop/web*" or "MB0401=NetworkPolicy web.shop". May be repeated.',
)  # fmt: skip
@click.option("--color/--no-color", default=None, help="Colours, also where the output is no terminal; or never.")
@click.option("-L", "--list-analyzers", is_flag=True, help="List what is looked for, and do nothing else.")
@click.option("--list-codes", is_flag=True, help="List the codes of findings, and do nothing else.")
def command(
    paths: tuple[Path, ...],
    files: tuple[Path, ...],
    kubeconfig: Path | None,
    context: str | None,
    istio_namespace: str,
    namespaces: tuple[str, ...],
    all_namespaces: bool,
    output: str,
    failure_threshold: str,
    output_threshold: str,
    suppress: tuple[str, ...],
    color: bool | None,
    list_analyzers: bool,
    list_codes: bool,
) -> None:
    """Find what is wrong, risky or in vain in policies and pods: of files, or else of the cluster.

    Every finding has a code with a page in docs/analysis. The annotation meshbridge.io/analyze-suppress on an object
    holds codes, separated by commas, that are not shown for it; * is all of them.

    \b
    Examples:
      meshbridge analyze                                        the cluster
      meshbridge analyze -f manifests/                          files, with nothing running: in a pull request
      meshbridge analyze -f manifests/ --failure-threshold warning -o sarif > findings.sarif
      meshbridge analyze -f manifests/ -S "MB0401=shop/*" -S "MB0503=NetworkPolicy *.shop"
      meshbridge analyze -f manifests/ -o json | jq -r '.[] | select(.level == "Error") | .message'
    \b
    Exit codes: 0 nothing reaches the failure threshold, 79 something does, 65 nothing but files that cannot be read
    does, 1 the cluster cannot be read.
    """
    if list_analyzers or list_codes:
        print_lines(_list(list_codes))
        return
    if all_namespaces and namespaces:
        raise click.UsageError("--namespace and --all-namespaces cannot both be given")
    suppressions = [Suppression.parse(text) for text in suppress]
    for suppression in suppressions:
        if not suppression.is_known:
            click.echo(f"Warning: there is no code {printable(suppression.code)}: it suppresses nothing", err=True)
    every = (*files, *paths)
    source = DocumentSource(kubeconfig=kubeconfig, context=context, istio_namespace=istio_namespace)
    documents, found = _read(every) if every else (source.read(), [])
    mesh, wrong = _mesh_of(documents)
    findings = in_order(kept([*found, *wrong, *analyze(documents, mesh, datetime.now(UTC))], suppressions, documents))
    findings = tuple(f for f in findings if not namespaces or f.origin.namespace in ("", *namespaces))
    shown = [f for f in findings if reaches(f.severity, Severity(output_threshold))]
    where = ", ".join(map(str, every)) or "the cluster"
    print_lines(_lines(shown, output, _coloured(color)))
    _finish(findings, shown, Severity(failure_threshold), where)


def _finish(findings: Sequence[Finding], shown: Sequence[Finding], threshold: Severity, where: str) -> None:
    """Say how it went on stderr, and exit as istioctl does."""
    failing = {found.code for found in findings if reaches(found.severity, threshold)}
    if failing:
        text = f"Error: issues of severity {threshold.value} or worse were found when analyzing {printable(where)}."
        click.echo(f"{text}\nSee {DOCUMENTATION} for their causes and resolutions.", err=True)
        sys.exit(UNREADABLE if failing == {"MB0001"} else FOUND_ISSUES)
    if not shown:
        click.echo(f"✔ No issues found when analyzing {printable(where)}.", err=True)


def _read(paths: Iterable[Path]) -> tuple[list[Document], list[Finding]]:
    """The objects of files; one that cannot be read is a finding, and the others are still looked at."""
    documents: list[Document] = []
    found: list[Finding] = []
    for path in manifest_files(paths):
        try:
            content = read_manifest(path)
        except ManifestError as error:
            line = error.__cause__.line if isinstance(error.__cause__, YamlError) else 0
            found.append(finding("MB0001", Origin("", "", "", "", str(path), line), error.what, fix=error.fix))
            continue
        documents += content.documents
        for problem in content.problems:
            origin = Origin("", "", "", "", problem.file, problem.line)
            found.append(finding("MB0004", origin, problem.text.removeprefix(f"{problem.file}:{problem.line}: ")))
    return documents, found


def _mesh_of(documents: Iterable[Document]) -> tuple[MeshSettings, list[Finding]]:
    try:
        return mesh_settings(documents), []
    except (ManifestError, MeshConfigError) as error:
        config = next(d for d in documents if d.kind == "ConfigMap")
        origin = Origin("ConfigMap", config.namespace, config.name, "", config.source.file, config.source.line(""))
        return DEFAULT_MESH, [finding("MB0005", origin, error.what, fix=error.fix)]


def _lines(findings: Sequence[Finding], output: str, coloured: bool) -> list[str]:
    match output:
        case "json":
            return [json.dumps([finding_record(found) for found in findings], indent=2)]
        case "yaml":
            records = [finding_record(found) for found in findings]
            return [yaml.safe_dump(records, sort_keys=False, allow_unicode=True, width=10_000).rstrip("\n")]
        case "sarif":
            return [json.dumps(sarif(findings, __version__), indent=2)]
        case _:
            return [line for found in findings for line in _text(found, coloured)]


def _text(found: Finding, coloured: bool) -> list[str]:
    """``Warning [MB0401] (Kind namespace/name file:line) text``, as istioctl has it; then the fix and who has part."""
    level = found.severity.value.capitalize()
    if coloured and found.severity in _COLOURS:
        level = click.style(level, fg=_COLOURS[found.severity], bold=found.severity is Severity.ERROR or None)
    where = printable(" ".join(filter(None, (found.resource, place(found.origin)))))
    lines = [f"{level} [{found.code}] ({where}) {printable(found.text)}", f"    fix: {printable(found.fix)}"]
    return [*lines, *(f"    see: {printable(str(other))}" for other in found.related)]


def _coloured(wanted: bool | None) -> bool:
    if wanted is not None:
        return wanted
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _list(codes: bool) -> list[str]:
    if codes:
        return aligned([("CODE", "SEVERITY", "NAME", "WHAT"), *(
            (code.code, code.severity.value, code.name, code.summary) for code in CODES.values()
        )])  # fmt: skip
    return aligned([("ANALYZER", "FINDS"), *((name, each.description) for name, each in ANALYZERS.items())])

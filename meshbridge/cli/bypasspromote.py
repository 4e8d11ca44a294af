"""``meshbridge bypass promote``: an audited BypassPolicy enforces from now on."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Final

import click

from meshbridge.bypass.bypasspolicy import (
    CLUSTERWIDE,
    GROUP,
    NAMESPACED,
    BypassPolicy,
    Mode,
    is_bypass_policy,
    parse_bypass_policy,
)
from meshbridge.bypass.promote import PromotionError, promoted
from meshbridge.cli.documents import context_option, kubeconfig_option
from meshbridge.cli.files import STDIN, ManifestError, manifest_files, read_manifest
from meshbridge.cli.observe import print_lines
from meshbridge.kube.api import Api, RefusedError
from meshbridge.kube.cluster import connect
from meshbridge.kube.objects import read_objects
from meshbridge.kube.yaml import YamlError
from meshbridge.observe.text import printable
from meshbridge.policy.model import Document

_ENFORCE: Final = {"spec": {"mode": "enforce"}}


@click.command(name="promote", context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("policy", metavar="[NAMESPACE/]NAME")
@click.option(
    "-f", "--filename", "files", multiple=True, metavar="FILE|DIR", type=click.Path(exists=True, path_type=Path),
    help="Change the policy in its file, in place, and nothing else of it. Without -f it is changed in the cluster.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say what would be changed, and change nothing.")
@kubeconfig_option
@context_option
def command(policy: str, files: tuple[Path, ...], dry_run: bool, kubeconfig: Path | None, context: str | None) -> None:
    """Turn 'mode: audit' of a BypassPolicy (NAMESPACE/NAME) or a ClusterBypassPolicy (NAME) into 'mode: enforce'.

    'meshbridge bypass audit' shows beforehand what will be dropped from then on.

    \b
    Examples:
      meshbridge bypass promote finance/reports -f policies/ --dry-run
      meshbridge bypass promote finance/reports -f policies/
      meshbridge bypass promote finance/reports
    \b
    Exit codes: 0 it enforces, or would with --dry-run; 1 it cannot be changed there.
    """
    if files and (kubeconfig or context):
        raise click.UsageError("--filename changes no cluster: leave out --kubeconfig and --context")
    namespace, slash, name = policy.rpartition("/")
    key = (GROUP, NAMESPACED if slash else CLUSTERWIDE, namespace, name)
    if files:
        print_lines([_promote_file(key, files, dry_run=dry_run)])
    else:
        print_lines([_promote_object(key, Api(connect(kubeconfig, context)), dry_run=dry_run)])


def _promote_file(key: tuple[str, str, str, str], files: tuple[Path, ...], *, dry_run: bool) -> str:
    found = [
        (path, document)
        for path in manifest_files(path for path in files if path != STDIN)
        for document in read_manifest(path).documents
        if document.key == key
    ]
    if len(found) != 1:
        places = ", ".join(f"{d.source.file}:{d.source.line('')}" for _, d in found)
        raise PromotionError(
            f"defined {len(found)} times ({places})" if found else "not in these files", where=_name(key),
            fix="keep one definition" if found else "name the file it stands in",
        )  # fmt: skip
    path, document = found[0]
    place = f"{printable(str(path))}:{document.source.line('spec.mode')}"
    if not _audits(document):
        return f"{place}: {_name(key)} enforces already"
    before = path.read_bytes()
    after = promoted(before, document)
    _check(before, after, document)
    if dry_run:
        return f"{place}: mode: audit would become mode: enforce ({_name(key)})"
    _replace(path, after)
    return f"{place}: mode: enforce ({_name(key)})"


def _promote_object(key: tuple[str, str, str, str], api: Api, *, dry_run: bool) -> str:
    group, kind, namespace, name = key
    resource = next(iter(api.discover({(group, kind)})), None)
    try:
        pages = list(api.pages(resource, namespace, name)) if resource is not None else []
        document = next((document for page in pages for document in page.documents), None)
        if resource is None or document is None:
            raise PromotionError("there is none", where=f"{api.where}, {_name(key)}", fix="-f names files instead")
        if not _audits(document):
            return f"{_name(key)} enforces already"
        if dry_run:
            return f"{_name(key)}: mode: audit would become mode: enforce"
        version = document.data["metadata"].get("resourceVersion")
        api.merge(resource, namespace, name, {**_ENFORCE, "metadata": {"resourceVersion": version}})
    except RefusedError as refused:
        raise api.error(refused) from None
    return f"{_name(key)}: mode: enforce"


def _audits(document: Document) -> bool:
    read: BypassPolicy = parse_bypass_policy(document)
    if read.refusal is not None:
        raise PromotionError(str(read.refusal), fix="mend it first: while it is not understood it enforces")
    return read.mode is Mode.AUDIT


def _check(before: bytes, after: bytes, policy: Document) -> None:
    """That the new content means the same, but for the one mode: an anchor may stand for more than one."""
    try:
        old, new = (read_objects(content, policy.source.file).documents for content in (before, after))
    except YamlError as error:
        raise ManifestError(error.what, where=f"{policy.source.file}:{error.line}", fix=error.fix) from error
    wanted = [{**d.data, "spec": {**d.data["spec"], "mode": "enforce"}} if d.key == policy.key else d.data for d in old]
    if [document.data for document in new] != wanted or not any(is_bypass_policy(d) for d in new):
        raise PromotionError(
            "the line means more than the mode of this policy", where=f"{policy.source.file}:"
            f"{policy.source.line('spec.mode')}", fix="write mode: enforce by hand",
        )  # fmt: skip


def _replace(path: Path, content: bytes) -> None:
    """The file has the new content as a whole, or the old one; a link stays a link."""
    target = path.resolve()
    try:
        with NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as scratch:
            try:
                scratch.write(content)
                scratch.flush()
                os.fsync(scratch.fileno())
                held = target.stat()
                os.fchmod(scratch.fileno(), held.st_mode & 0o7777)
                os.fchown(scratch.fileno(), held.st_uid, held.st_gid)
                os.replace(scratch.name, target)
            except BaseException:
                os.unlink(scratch.name)
                raise
    except OSError as error:
        raise ManifestError(f"cannot be written: {error.strerror}", where=str(path)) from error


def _name(key: tuple[str, str, str, str]) -> str:
    _, kind, namespace, name = key
    return printable(f"{kind} {namespace}/{name}" if namespace else f"{kind} {name}")

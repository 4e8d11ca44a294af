"""Where a verb's objects come from: files named with ``-f``, or else the cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from meshbridge.cli.files import ManifestError, read_manifests
from meshbridge.controller.meshconfig import read_mesh_config
from meshbridge.kube.cluster import ISTIO_NAMESPACE, connect, read_cluster
from meshbridge.kube.objects import MESH_CONFIG
from meshbridge.observe.text import printable
from meshbridge.policy.mesh import DEFAULT_MESH, MeshSettings
from meshbridge.policy.model import Document

_Command = TypeVar("_Command", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class DocumentSource:
    """What the options of ``document_options`` say. With ``files`` nothing has to run; ``namespaces`` empty: all."""

    files: tuple[Path, ...] = ()
    kubeconfig: Path | None = None
    context: str | None = None
    namespaces: tuple[str, ...] = ()
    istio_namespace: str = ISTIO_NAMESPACE

    def read(self) -> list[Document]:
        """Every object; what a person should know of what is not among them goes to stderr.

        Raises:
            ManifestError: a file is no manifest.
            ClusterError: the cluster cannot be read, or not all of it that is needed.
        """
        if self.files:
            return read_manifests(self.files)
        content = read_cluster(connect(self.kubeconfig, self.context), self.namespaces, self.istio_namespace)
        if content.absent:
            _say(f"Note: not known to this cluster, so not read: {', '.join(content.absent)}")
        if self.namespaces:
            read = ", ".join(sorted({*self.namespaces, self.istio_namespace}))
            _say(f"Warning: only {read} were read: the addresses of pods elsewhere are taken for the world's")
        if not content.configured:
            text = f"no ConfigMap {MESH_CONFIG} in {self.istio_namespace}: Istio's defaults are assumed"
            _say(f"Note: {text}; --istio-namespace names another")
        return list(content.documents)


files_option = click.option(
    "-f", "--filename", "files", multiple=True, metavar="FILE|DIR",
    type=click.Path(exists=True, allow_dash=True, path_type=Path),
    help="Manifests in place of the cluster: a file, a directory, or - for standard input. May be repeated.",
)  # fmt: skip
kubeconfig_option = click.option(
    "--kubeconfig", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The kubeconfig to use.  [$KUBECONFIG, ~/.kube/config, in a pod its service account]",
)  # fmt: skip
context_option = click.option("--context", metavar="NAME", help="The kubeconfig's context to use.  [its current one]")
istio_namespace_option = click.option(
    "-i", "--istio-namespace", metavar="NS", default=ISTIO_NAMESPACE, show_default=True,
    help="Where the cluster's mesh is configured.",
)  # fmt: skip


def document_options(command: _Command) -> Callable[..., Any]:
    """Give a verb the options that say where objects come from; it gets them as ``documents``, a DocumentSource."""

    @files_option
    @kubeconfig_option
    @context_option
    @click.option(
        "-n", "--namespace", "namespaces", multiple=True, metavar="NS",
        help="Read only this namespace of the cluster, and the mesh's root. May be repeated.",
    )  # fmt: skip
    @click.option("-A", "--all-namespaces", is_flag=True, help="Read all namespaces, which is the default.")
    @istio_namespace_option
    @wraps(command)
    def with_documents(
        *args: Any,
        files: tuple[Path, ...],
        kubeconfig: Path | None,
        context: str | None,
        namespaces: tuple[str, ...],
        all_namespaces: bool,
        istio_namespace: str,
        **options: Any,
    ) -> Any:
        if all_namespaces and namespaces:
            raise click.UsageError("--namespace and --all-namespaces cannot both be given")
        if files and (kubeconfig or context or namespaces):
            raise click.UsageError("--filename reads no cluster: leave out --kubeconfig, --context and --namespace")
        source = DocumentSource(files, kubeconfig, context, namespaces, istio_namespace)
        return command(*args, documents=source, **options)

    return with_documents


def mesh_settings(documents: Iterable[Document]) -> MeshSettings:
    """What the mesh's ConfigMap among the objects says, or Istio's defaults.

    Raises:
        ManifestError: there are several.
        MeshConfigError: it is not understood.
    """
    configs = [d for d in documents if d.kind == "ConfigMap" and d.name == MESH_CONFIG]
    if len(configs) > 1:
        names = ", ".join(str(config) for config in configs)
        raise ManifestError(f"several ConfigMaps {MESH_CONFIG!r}: {names}", fix="name the manifests of one mesh")
    return read_mesh_config(configs[0]) if configs else DEFAULT_MESH


def _say(text: str) -> None:
    click.echo(printable(text), err=True)

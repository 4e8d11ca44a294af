"""What is installed: the objects of ``deploy/``, which the package carries, and the few choices there are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import yaml

from meshbridge.errors import MeshBridgeError, SettingsError

Object = Mapping[str, Any]

NAMESPACE: Final = "meshbridge-system"
BASE: Final = Path("kustomize/base")
FOREIGN: Final = Path("kustomize/foreign-crds")
"""A folder for each API group whose definitions somebody else brings, as a rule."""
COMPONENTS: Final = ("controller", "agent", "authz", "webhook")
PART_OF: Final = {"app.kubernetes.io/part-of": "meshbridge"}
MANAGED_BY: Final = "app.kubernetes.io/managed-by"
INSTALLER: Final = "meshbridge-install"
"""Value of ``MANAGED_BY`` on what ``meshbridge install`` put into a cluster."""

_DEFINITION: Final = "CustomResourceDefinition"
_STAGES: Final[Mapping[str, int]] = {
    "Namespace": 0, _DEFINITION: 1, "DaemonSet": 3, "Deployment": 3,
    "MutatingWebhookConfiguration": 4, "ValidatingWebhookConfiguration": 4,
}  # fmt: skip
_OTHER_STAGE: Final = 2
_IMAGE = re.compile(r"[a-z0-9]+([._:/-]+[A-Za-z0-9]+)*(@sha256:[0-9a-f]{64})?")


class Enforcer(StrEnum):
    """Who drops packets: our programs on pods' interfaces, or Cilium by exported policies."""

    EBPF = "ebpf"
    CILIUM = "cilium"


@dataclass(frozen=True, slots=True)
class Options:
    """The choices of an installation; what is left empty is as the manifests have it.

    Args:
        replicas: Of the controller and of the webhook.
        fixes: The controller may apply what a sidecar needs for calls to a bypassed port.
        deny_refused: The webhook denies policies of other owners' kinds that are not understood.
        definitions: API groups whose kinds are installed where the cluster does not have them.
    """

    image: str = ""
    replicas: int = 0
    enforcer: Enforcer = Enforcer.EBPF
    fixes: bool = True
    deny_refused: bool = False
    definitions: frozenset[str] = frozenset()


def packaged() -> Path:
    """The folder ``deploy`` of this package.

    Raises:
        MeshBridgeError: it was packaged without.
    """
    directory = Path(__file__).resolve().parent.parent / "_deploy"
    if not (directory / BASE / "kustomization.yaml").is_file():
        raise MeshBridgeError("this package has no manifests", where=str(directory), fix="install it again, whole")
    return directory


def foreign_groups(directory: Path) -> tuple[str, ...]:
    """The API groups that ``Options.definitions`` may name."""
    return tuple(sorted(path.name for path in (directory / FOREIGN).iterdir() if path.is_dir()))


def render(directory: Path, options: Options) -> tuple[Object, ...]:
    """Every object of an installation, in the order in which they have to come.

    Webhook configurations come last, so that nothing waits for a webhook that is not there yet.

    Raises:
        SettingsError: an option cannot be used.
    """
    objects = [dict(each) for each in _read(directory / BASE)]
    for group in sorted(options.definitions):
        if group not in foreign_groups(directory):
            raise SettingsError(
                f"{group!r} is not known", where="--with-crds", fix=f"use {', '.join(foreign_groups(directory))}"
            )
        objects += [dict(each) for each in _read(directory / FOREIGN / group)]
    chosen = (deepcopy(each) for each in objects if _is_wanted(each, options))
    return tuple(sorted((_with(each, options) for each in chosen), key=stage))


def stage(each: Object) -> int:
    """What has a lower stage has to be there first."""
    return _STAGES.get(each["kind"], _OTHER_STAGE)


def is_definition(each: Object) -> bool:
    return str(each["kind"]) == _DEFINITION


def is_foreign(each: Object) -> bool:
    """A definition of kinds that are not ours: others may bring it, and objects of it outlive us."""
    return is_definition(each) and each["spec"]["group"] != "meshbridge.io"


def name_of(each: Object) -> str:
    """Kind, namespace and name, as a person reads them."""
    namespace = each["metadata"].get("namespace")
    return f"{each['kind']} {namespace + '/' if namespace else ''}{each['metadata']['name']}"


def key_of(each: Object) -> tuple[str, str, str, str]:
    """Group, kind, namespace and name: one object, whatever version it is written in."""
    metadata = each["metadata"]
    return group_of(each), str(each["kind"]), str(metadata.get("namespace") or ""), str(metadata["name"])


def group_of(each: Object) -> str:
    return str(each["apiVersion"]).rpartition("/")[0]


def component_of(each: Object) -> str:
    return str((each["metadata"].get("labels") or {}).get("app.kubernetes.io/component", ""))


def _read(folder: Path) -> Iterator[Object]:
    """The objects of a kustomization that has resources and nothing else."""
    file = next(path for name in ("kustomization.yaml", "Kustomization") if (path := folder / name).is_file())
    for resource in yaml.safe_load(file.read_text(encoding="utf-8"))["resources"]:
        path = folder / resource
        if path.is_dir():
            yield from _read(path)
        else:
            yield from (each for each in yaml.safe_load_all(path.read_text(encoding="utf-8")) if each)


def _is_wanted(each: Object, options: Options) -> bool:
    if each["metadata"]["name"] == "meshbridge-fixes" and not options.fixes:
        return False
    return not (each["kind"] == "DaemonSet" and component_of(each) == "agent" and options.enforcer is Enforcer.CILIUM)


def _with(each: dict[str, Any], options: Options) -> dict[str, Any]:
    each["metadata"]["labels"] = {**each["metadata"].get("labels", {}), **PART_OF, MANAGED_BY: INSTALLER}
    if each["kind"] not in ("DaemonSet", "Deployment"):
        return each
    spec = each["spec"]
    if each["kind"] == "Deployment" and options.replicas:
        spec["replicas"] = options.replicas
    for container in spec["template"]["spec"]["containers"]:
        if options.image:
            container["image"] = _checked_image(options.image)
        if component_of(each) == "webhook" and options.deny_refused:
            container["args"].append("--deny-refused")
    return each


def _checked_image(image: str) -> str:
    if not _IMAGE.fullmatch(image):
        raise SettingsError(f"{image!r} is no image", where="--image", fix="write REGISTRY/NAME:TAG, or NAME@sha256:…")
    return image

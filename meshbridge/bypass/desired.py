"""What Istio has to hold so that connections to bypassed ports work: all of it, as a function of everything else.

It is computed as if nothing of it were there yet. So it does not change by being applied, and goes with its cause: when
the exclusion, the Service or the pod is gone, the object is not wanted any more.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from meshbridge.bypass.fixes import MADE, Fix, fixes, is_made_here
from meshbridge.bypass.inventory import inventory
from meshbridge.policy.mesh import MeshSettings
from meshbridge.policy.model import Document

Object = dict[str, Any]
Key = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Desired:
    """``objects`` in the order to apply them: what closes comes before what opens. ``stale`` are objects of ours that
    nothing asks for any more, as kind, namespace and name, in the order to delete them: what opens first.

    ``left`` is what only a person can mend.
    """

    objects: tuple[Object, ...] = ()
    stale: tuple[Key, ...] = ()
    left: tuple[Fix, ...] = ()


def desired_objects(documents: Iterable[Document], mesh: MeshSettings | None = None) -> Desired:
    """What there has to be beside these objects, those of ours among them left out of the reckoning."""
    given = list(documents)
    ours = [document for document in given if is_made_here(document)]
    others = [document for document in given if not is_made_here(document)]
    found = fixes(inventory(others, mesh=mesh), others)
    wanted = {_key(fix.apply): fix.apply for fix in found if fix.apply is not None}
    present = {(document.kind, document.namespace, document.name) for document in ours}
    stale = sorted(present - wanted.keys(), key=lambda key: (-MADE.index(key[0]), key))
    objects = sorted(wanted.items(), key=lambda item: (MADE.index(item[0][0]), item[0]))
    return Desired(tuple(made for _, made in objects), tuple(stale), tuple(fix for fix in found if fix.todo))


def _key(made: Object) -> Key:
    return made["kind"], made["metadata"]["namespace"], made["metadata"]["name"]

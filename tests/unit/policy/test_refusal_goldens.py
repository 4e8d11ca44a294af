"""What the author of a bad policy reads: one file per field and kind of mistake, the sentence in its first line.

A case is ``refusals/KIND/CASE.yaml``: a first line ``# refused: SENTENCE``, then one object that the parser refuses. A
new case needs no Python: write the object below the line ``# refused:`` and run this file with UPDATE_GOLDEN=1, then
read what it wrote. A kind in ``COMPLETE`` has a case for every field its parser knows.
"""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

import pytest

from meshbridge.kube.objects import read_objects
from meshbridge.policy.model import Document, Refusal
from meshbridge.policy.parse import parse
from meshbridge.policy.parse.reader import Reader

FOLDER = Path(__file__).parent / "refusals"
CASES = sorted(FOLDER.glob("*/*.yaml"))
COMPLETE = (
    "AdminNetworkPolicy",
    "AuthorizationPolicy",
    "BaselineAdminNetworkPolicy",
    "ClusterNetworkPolicy",
    "NetworkPolicy",
    "PeerAuthentication",
    "RequestAuthentication",
)

_MARK = "# refused:"


def object_of(path: Path) -> Document:
    content = read_objects(path.read_bytes(), path.name)
    assert not content.problems, content.problems
    (document,) = content.documents
    return document


def refusal_of(path: Path) -> Refusal:
    parsed = parse(object_of(path))
    assert parsed.refusals, "it is accepted"
    (refusal,) = parsed.refusals
    return refusal


@pytest.mark.parametrize("path", CASES, ids=[f"{path.parent.name}/{path.stem}" for path in CASES])
def test_the_author_reads_place_reason_and_fix(path: Path) -> None:
    assert object_of(path).kind == path.parent.name
    refusal = refusal_of(path)
    assert refusal.fix, "it does not say how to mend it"
    text = path.read_text()
    first, _, rest = text.partition("\n")
    assert first.startswith(_MARK), f"the first line must begin with {_MARK!r}"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(f"{_MARK} {refusal}\n{rest}")
        return
    assert first == f"{_MARK} {refusal}"


@pytest.mark.parametrize("kind", COMPLETE)
def test_every_field_has_a_case(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field is one by its name and the name of what it stands in: ``ports.endPort``."""
    known: set[str] = set()
    read = Reader.fields

    def recording(at: Reader, *names: str) -> dict[str, Reader]:
        known.update(f"{_steps(at.path)[-1]}.{name}" for name in names)
        return read(at, *names)

    monkeypatch.setattr(Reader, "fields", recording)
    refused = set()
    for path in CASES:
        if path.parent.name == kind:
            steps = _steps(refusal_of(path).path)
            refused |= {".".join(pair) for pair in itertools.pairwise(steps)}
    assert known - refused == set(), f"fields of {kind} without a case"


def _steps(path: str) -> list[str]:
    return re.sub(r"\[\d+\]", "", path).split(".")

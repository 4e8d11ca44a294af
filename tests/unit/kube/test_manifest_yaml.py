"""Text anybody may have written: read with its lines, or refused with one."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from meshbridge.kube.objects import MAX_OBJECT_BYTES, read_objects
from meshbridge.kube.yaml import MAX_DEPTH, MAX_LINES, YamlError, read_documents

INPUTS = Path(__file__).parents[3] / "manifests" / "inputs"

POLICY = """\
# a comment
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata:
  name: web
  namespace: shop
spec:
  endpointSelector: {}
  ingress:
  - fromEndpoints:
    - matchLabels:
        app: client
    toPorts:
    - ports: [{port: "80"}, {port: "443", protocol: TCP}]
---
apiVersion: v1
kind: List
items:
- apiVersion: networking.k8s.io/v1
  kind: NetworkPolicy
  metadata: {name: deny}
  spec:
    podSelector: {}
"""


def test_every_value_has_the_line_of_its_key() -> None:
    first, second = read_objects(POLICY.encode(), "shop.yaml").documents
    lines = first.source.lines
    assert {path: lines[path] for path in ("", "kind", "metadata.name", "spec", "spec.ingress", "spec.ingress[0]")} == {
        "": 2,
        "kind": 3,
        "metadata.name": 5,
        "spec": 7,
        "spec.ingress": 9,
        "spec.ingress[0]": 10,
    }
    assert lines["spec.ingress[0].fromEndpoints[0].matchLabels.app"] == 12
    assert lines["spec.ingress[0].toPorts[0].ports[1].protocol"] == 14
    assert second.source.lines["spec.podSelector"] == 23
    assert second.source.line("") == 19
    assert str(second) == "NetworkPolicy default/deny (shop.yaml:19)"


def test_lines_of_a_long_policy_are_kept_for_the_outer_values() -> None:
    text = "spec:\n  rules:\n" + "".join(f"  - a: {{b: {i}}}\n" for i in range(MAX_LINES // 2))
    (document,) = read_documents(text.encode())
    assert len(document.lines) <= MAX_LINES
    assert document.lines["spec.rules[9]"] == 12
    assert "spec.rules[9].a.b" not in document.lines


@pytest.mark.parametrize("path", sorted(INPUTS.glob("*.yaml")), ids=lambda path: path.name)
def test_the_users_own_files_read_as_any_yaml_reader_reads_them(path: Path) -> None:
    content = path.read_bytes()
    assert [d.data for d in read_objects(content, str(path)).documents] == list(yaml.safe_load_all(content))


SCALARS = {
    "plain text": ("web", "web"),
    "a quoted number": ('"8080"', "8080"),
    "a number": ("8080", 8080),
    "octal, as kubectl reads it": ("0644", 420),
    "hexadecimal": ("0x1f", 31),
    "negative": ("-1", -1),
    "a fraction": ("1.5", 1.5),
    "with an exponent": ("1e3", 1000.0),
    "yes": ("yes", True),
    "Off": ("Off", False),
    "nothing": ("", None),
    "a tilde": ("~", None),
    "a time of day is no number": ("12:30:45", "12:30:45"),
    "a date is text": ("2026-11-24", "2026-11-24"),
    "an address": ("10.0.0.1", "10.0.0.1"),
    "a version": ("1.2.3", "1.2.3"),
    "an IPv6 address": ("'::1'", "::1"),
    "an explicit string": ("!!str 80", "80"),
    "text that starts like a number": ("8080-tcp", "8080-tcp"),
}


@pytest.mark.parametrize(("text", "expected"), SCALARS.values(), ids=SCALARS.keys())
def test_scalars(text: str, expected: object) -> None:
    (document,) = read_documents(f"value: {text}\n".encode())
    assert document.data == {"value": expected}
    assert type(document.data["value"]) is type(expected)


def test_keys_become_strings_as_in_json() -> None:
    (document,) = read_documents(b"8080: {mode: STRICT}\ntrue: x\n")
    assert document.data == {"8080": {"mode": "STRICT"}, "true": "x"}


def test_aliases_are_values() -> None:
    (document,) = read_documents(b"a: &x {k: 1}\nb: *x\n")
    assert document.data == {"a": {"k": 1}, "b": {"k": 1}}


BOMB = b"a: &a [" + b"x, " * 99 + b"x]\n"
for level in b"bcdefg":
    BOMB += b"%c: &%c [" % (level, level) + b"*%c, " % (level - 1) * 20 + b"]\n"

MALFORMED = {
    "an unclosed bracket": (b"a: 1\nb: [1,\n", 3, "not YAML"),
    "a tab as indentation": (b"a:\n\tb: 1\n", 2, "not YAML"),
    "invalid UTF-8": (b"a: 1\nb: \xff\n", 2, "byte 0xff is not UTF-8"),
    "UTF-16": ("a: 1".encode("utf-16"), 1, "not UTF-8"),
    "a truncated character": (b"a: 1\nb: \xe2\x82", 2, "not UTF-8"),
    "a NUL": (b"a: 1\n\nb: \0\n", 3, "NUL"),
    "a control character": (b"a: \x07\n", 1, "not YAML"),
    "a duplicate key": (b"a: 1\nb: 2\na: 3\n", 3, "duplicate key 'a'"),
    "a duplicate key after conversion": (b'8080: 1\n"8080": 2\n', 2, "duplicate key"),
    "a bomb of aliases": (BOMB, 4, "more than"),
    "an alias to itself": (b"a: &a\n  b: *a\n", 2, "to itself"),
    "an alias to nothing": (b"a: *b\n", 1, "alias"),
    "deep nesting": (b"a: " + b"[" * 5_000 + b"]" * 5_000, 1, f"deeper than {MAX_DEPTH}"),
    "deep nesting in blocks": (b"".join(b" " * i + b"a:\n" for i in range(90)), MAX_DEPTH + 2, "deeper than"),
    "a Python object": (b"a: !!python/object/apply:os.system [ls]\n", 1, "tag"),
    "binary": (b"a: !!binary aGk=\n", 1, "tag"),
    "a merge key": (b"x: &x {a: 1}\ny:\n  <<: *x\n", 3, "merge key"),
    "a list as key": (b"? [1]\n: 2\n", 1, "key"),
    "null as key": (b"~: 2\n", 1, "key"),
    "a number too long to read": (b"a: " + b"9" * 100_000, 1, "100000 digits"),
    "an infinite number": (b"a: .inf\n", 1, "finite"),
    "too many values": (b"a: [" + b"1," * 400_001 + b"]", 1, "more than"),
}


@pytest.mark.parametrize(("content", "line", "words"), MALFORMED.values(), ids=MALFORMED.keys())
def test_what_cannot_be_read_is_named_with_its_line(content: bytes, line: int, words: str) -> None:
    with pytest.raises(YamlError) as refused:
        read_documents(content)
    assert words in str(refused.value)
    assert refused.value.line == line
    assert refused.value.fix


NOT_OBJECTS = {
    "a list": (b"- a\n", 1, "no mapping"),
    "text": (b"hello\n", 1, "no mapping"),
    "no apiVersion": (b"kind: Pod\nmetadata: {name: a}\n", 1, "without apiVersion"),
    "no kind": (b"apiVersion: v1\nmetadata: {name: a}\n", 1, "without kind"),
    "kind is a list": (b"apiVersion: v1\nkind: [Pod]\nmetadata: {name: a}\n", 2, "without kind"),
    "no metadata": (b"apiVersion: v1\nkind: Pod\n", 1, "without metadata"),
    "metadata is text": (b"apiVersion: v1\nkind: Pod\nmetadata: x\n", 3, "without metadata"),
    "no name": (b"apiVersion: v1\nkind: Pod\nmetadata: {namespace: a}\n", 3, "metadata.name is missing"),
    "a name with a slash": (b"apiVersion: v1\nkind: Pod\nmetadata:\n  name: ../a\n", 4, "'../a' is no name"),
    "a name with a line break": (b'apiVersion: v1\nkind: Pod\nmetadata: {name: "a\\nb"}\n', 3, "is no name"),
    "a namespace that is a number": (
        b"apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: 5}\n",
        3,
        "is no name",
    ),
    "items that are no list": (b"apiVersion: v1\nkind: List\nitems: {}\n", 3, "no list"),
    "an item that is no mapping": (b"apiVersion: v1\nkind: List\nitems:\n- {}\n- x\n", 4, "without apiVersion"),
}


@pytest.mark.parametrize(("content", "line", "words"), NOT_OBJECTS.values(), ids=NOT_OBJECTS.keys())
def test_what_is_no_object_is_named_with_its_line(content: bytes, line: int, words: str) -> None:
    with pytest.raises(YamlError) as refused:
        read_objects(content, "f.yaml")
    assert words in str(refused.value)
    assert refused.value.line == line


def policy_of_size(rules: int) -> bytes:
    rule = "  - fromEndpoints:\n    - matchLabels: {app: client}\n"
    return (
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: big}\nspec:\n  ingress:\n" + rule * rules
    ).encode()


def test_a_policy_of_one_megabyte_is_read() -> None:
    content = policy_of_size(20_000)
    assert len(content) > 1_000_000
    (document,) = read_objects(content, "f.yaml").documents
    assert len(document.data["spec"]["ingress"]) == 20_000


def test_a_policy_no_api_server_would_take_is_refused() -> None:
    with pytest.raises(YamlError, match=f"more than {MAX_OBJECT_BYTES}"):
        read_objects(policy_of_size(40_000), "f.yaml")


def test_kinds_that_are_not_read_are_listed() -> None:
    content = b"apiVersion: v1\nkind: Namespace\nmetadata: {name: a}\n"
    content += b"---\napiVersion: batch/v1\nkind: Job\nmetadata: {name: j}\n"
    found = read_objects(content, "f.yaml")
    assert [document.kind for document in found.documents] == ["Namespace"]
    assert [(problem.line, problem.reason.value) for problem in found.problems] == [(5, "not-read")]


def test_only_the_mesh_config_is_read_of_config_maps_and_no_secret() -> None:
    content = b"".join(
        b"---\napiVersion: v1\nkind: %s\nmetadata: {name: %s, namespace: istio-system}\n" % (kind, name)
        for kind, name in ((b"ConfigMap", b"istio"), (b"ConfigMap", b"other"), (b"Secret", b"s"))
    )
    assert [(d.kind, d.name) for d in read_objects(content, "f").documents] == [("ConfigMap", "istio")]


@given(st.binary(max_size=200))
def test_no_bytes_do_worse_than_a_named_problem(content: bytes) -> None:
    with contextlib.suppress(YamlError):
        read_objects(content, "f.yaml")


TEXT = st.text(alphabet="abyzYN~:-#'\" {}[]\n,!|>%@`?é", max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | TEXT,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(TEXT, children, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(TEXT, JSON, min_size=1, max_size=4))
def test_what_was_written_is_read_back(value: dict) -> None:
    (document,) = read_documents(yaml.safe_dump(value, allow_unicode=True).encode())
    assert document.data == value

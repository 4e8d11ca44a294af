"""What an AdmissionReview is answered with: warnings, denials and patches, and what around it decides them."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from meshbridge.bypass.admission import review
from meshbridge.bypass.automatic import automatic_exclusions
from meshbridge.bypass.inventory import inventory
from meshbridge.kube.objects import read_objects
from meshbridge.policy.mesh import DEFAULT_MESH
from meshbridge.webhook.admission import (
    MAX_WARNING,
    MAX_WARNINGS,
    Answer,
    ReviewError,
    answered,
    gate,
    mutate,
    read_request,
)
from meshbridge.webhook.admission import validate as validated
from meshbridge.webhook.surroundings import Surroundings

NOW = datetime(2026, 11, 24, tzinfo=UTC)
IN = "traffic.sidecar.istio.io/excludeInboundPorts"
NAMESPACES = """
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {istio-injection: enabled}}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: other, labels: {istio-injection: enabled}}}
---
"""


def around(*texts: str) -> Surroundings:
    found = Surroundings()
    documents = read_objects((NAMESPACES + "---\n".join(texts)).encode(), "").documents
    found.apply({document.key: (document,) for document in documents}, DEFAULT_MESH, None)
    return found


def bypass_policy(spec: str, name: str = "p", namespace: str = "shop") -> str:
    metadata = f"metadata: {{name: {name}, namespace: {namespace}}}"
    return f"{{apiVersion: meshbridge.io/v1alpha1, kind: BypassPolicy, {metadata}, spec: {spec}}}\n"


def pod(annotations: str = "", name: str = "api", extra: str = "") -> str:
    metadata = f"{{name: {name}, namespace: shop, labels: {{app: {name}}}, annotations: {{{annotations}}}}}"
    spec = f"{{containers: [{{name: app, ports: [{{containerPort: 8080}}, {{containerPort: 9090}}]}}{extra}]}}"
    return f"{{apiVersion: v1, kind: Pod, metadata: {metadata}, spec: {spec}}}\n"


def client(name: str, namespace: str = "other", address: str = "10.0.0.9", labels: str = "") -> str:
    metadata = f"{{name: {name}, namespace: {namespace}, labels: {{{labels}}}}}"
    spec = "{containers: [{name: app}, {name: istio-proxy}]}"
    return f"{{apiVersion: v1, kind: Pod, metadata: {metadata}, spec: {spec}, status: {{podIP: {address}}}}}\n"


def sent(text: str, operation: str = "CREATE", old: str = "") -> dict[str, Any]:
    given = yaml.safe_load(text)
    request = {"uid": "u", "operation": operation, "namespace": "shop", "object": given}
    if old:
        request["oldObject"] = yaml.safe_load(old)
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}


def validate(text: str, found: Surroundings, **options: Any) -> Answer:
    return validated(read_request(sent(text)), found, NOW, **options)


def test_a_pod_gets_what_its_review_among_the_whole_cluster_says() -> None:
    others = [bypass_policy("{otherwise: deny}", namespace="other"), bypass_policy("{routes: []}"), client("c")]
    written = pod(f'{IN}: "8080"')
    whole = inventory(read_objects((NAMESPACES + "---\n".join([*others, written])).encode(), "").documents, now=NOW)
    expected = review(next(w for w in whole.workloads if w.name == "api"), whole)
    assert expected.warnings
    assert validate(written, around(*others)).warnings == expected.warnings


DENIALS = {
    "no policy": ("", False),
    "of its namespace": (bypass_policy("{otherwise: deny}"), True),
    "of another namespace": (bypass_policy("{otherwise: deny}", namespace="other"), False),
    "of another pod": (bypass_policy("{selector: {matchLabels: {app: x}}, otherwise: deny}"), False),
    "clusterwide": (
        "{apiVersion: meshbridge.io/v1alpha1, kind: ClusterBypassPolicy, metadata: {name: c}, "
        "spec: {namespaceSelector: {matchLabels: {istio-injection: enabled}}, otherwise: deny}}\n",
        True,
    ),
    "accepted": (bypass_policy("{accept: [encryption], reason: r, otherwise: deny}"), False),
}


@pytest.mark.parametrize(("policy", "denied"), DENIALS.values(), ids=DENIALS.keys())
def test_policies_that_select_the_pod_deny_it(policy: str, denied: bool) -> None:
    answer = validate(pod(f'{IN}: "8080"'), around(policy))
    assert bool(answer.denied) is denied
    response = answered(read_request(sent(pod())), answer)["response"]
    assert response["allowed"] is not denied
    if denied:
        assert response["status"]["code"] == 403
        assert "inbound TCP 8080 bypasses Envoy" in response["status"]["message"]


def test_a_policy_of_the_meshs_root_counts_for_every_namespace() -> None:
    get = (
        "{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: get, namespace: istio-system}, "
        "spec: {rules: [{to: [{operation: {methods: [GET]}}]}]}}\n"
    )
    assert "authorization" not in validate(pod(f'{IN}: "8080"'), around()).warnings[0]
    assert "loses encryption, authorization" in validate(pod(f'{IN}: "8080"'), around(get)).warnings[0]


def test_what_is_deleted_counts_no_more() -> None:
    found = around(bypass_policy("{otherwise: deny}"))
    found.apply({("meshbridge.io", "BypassPolicy", "shop", "p"): ()}, DEFAULT_MESH, None)
    assert not validate(pod(f'{IN}: "8080"'), found).denied


def test_until_the_cluster_is_read_pods_are_let_in_with_a_warning_and_policies_judged() -> None:
    answer = validate(pod(f'{IN}: "8080"'), Surroundings())
    assert not answer.denied
    assert "has not read the whole cluster yet" in answer.warnings[0]
    assert validate(bypass_policy("{mode: off}"), Surroundings()).denied
    automatic = mutate(read_request(sent(pod("meshbridge.io/bypass: auto"))), Surroundings(), NOW)
    assert (automatic.patch, len(automatic.warnings)) == ((), 1)


def test_a_template_is_never_denied() -> None:
    template = yaml.safe_load(pod(f'{IN}: "8080"'))
    deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d", "namespace": "shop"},
                  "spec": {"template": template}}  # fmt: skip
    answer = validate(json.dumps(deployment), around(bypass_policy("{otherwise: deny}")))
    assert not answer.denied
    assert answer.warnings[0].startswith("its pods will be refused: inbound TCP 8080")


def test_a_refused_policy_of_ours_is_denied_by_path_reason_and_fix() -> None:
    answer = validate(bypass_policy("{accept: [l7]}"), around())
    response = answered(read_request(sent(pod())), answer)["response"]
    assert response["status"] == {
        "code": 422, "reason": "Invalid",
        "message": "BypassPolicy shop/p spec.reason: a loss is accepted without a reason; "
                   "write why, for whoever reads it",
        "details": {"causes": [{"field": "spec.reason", "message": "a loss is accepted without a reason",
                                "reason": "FieldValueInvalid"}]},
    }  # fmt: skip


def test_an_update_that_changes_no_word_of_a_refused_policy_passes() -> None:
    """Its finalizers have to go when it goes."""
    bad = bypass_policy("{mode: off}")
    labelled = yaml.safe_load(bad)
    labelled["metadata"]["finalizers"] = []
    request = read_request(sent(json.dumps(labelled), "UPDATE", bad))
    assert not validated(request, around(), NOW).denied
    assert validated(read_request(sent(bad, "UPDATE", bypass_policy("{}"))), around(), NOW).denied


def test_an_acceptance_that_is_over_is_said_to_be() -> None:
    over = '{accept: [l7], reason: r, until: "2026-01-01T00:00:00Z"}'
    assert validate(bypass_policy(over), around()).warnings == (
        "BypassPolicy shop/p accepts nothing any more: spec.until is over",
    )


STRANGE = {
    "CiliumNetworkPolicy": ("cilium.io/v2", "{endpointSelector: {}, ingress: [{fromNowhere: []}]}", "is isolated"),
    "NetworkPolicy": ("networking.k8s.io/v1", "{podSelector: {matchLabels: 1}}", "is isolated"),
    "AuthorizationPolicy": ("security.istio.io/v1", "{action: MAYBE}", "are closed"),
    "PeerAuthentication": ("security.istio.io/v1", "{mtls: {mode: LOOSE}}", "are closed"),
    "RequestAuthentication": ("security.istio.io/v1", "{jwtRules: 1}", "are closed"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_policy_of_others_that_is_not_understood_is_warned_of_or_denied_if_asked(kind: str) -> None:
    version, spec, held = STRANGE[kind]
    text = f"{{apiVersion: {version}, kind: {kind}, metadata: {{name: p, namespace: shop}}, spec: {spec}}}"
    (warning,) = validate(text, around()).warnings
    assert warning.startswith(f"not understood by MeshBridge: {kind} shop/p spec")
    assert held in warning
    answer = validate(text, around(), deny_refused=True)
    assert answer.denied.startswith(f"{kind} shop/p spec")
    assert answer.code == 422


def automatic(text: str, found: Surroundings) -> Answer:
    return mutate(read_request(sent(text)), found, NOW)


ACCEPTED = bypass_policy("{accept: [encryption], reason: r}")
AUTO = "meshbridge.io/bypass: auto"


def patched(text: str, answer: Answer) -> str:
    """The pod with the patch applied, as the API server does with additions to a mapping."""
    changed = yaml.safe_load(text)
    for operation in answer.patch:
        assert operation["op"] == "add"
        *_, name = operation["path"].removeprefix("/metadata/annotations/").split("/")
        changed["metadata"]["annotations"][name.replace("~1", "/").replace("~0", "~")] = operation["value"]
    return json.dumps(changed)


def test_auto_adds_the_exclusions_and_asked_again_nothing() -> None:
    found = around(ACCEPTED)
    answer = automatic(pod(AUTO), found)
    response = answered(read_request(sent(pod())), answer)["response"]
    assert response["patchType"] == "JSONPatch"
    assert json.loads(base64.b64decode(response["patch"])) == [
        {"op": "add", "path": "/metadata/annotations/traffic.sidecar.istio.io~1excludeInboundPorts",
         "value": "8080,9090"},
    ]  # fmt: skip
    assert response["auditAnnotations"] == {"excluded": f"{IN}=8080,9090"}
    again = patched(pod(AUTO), answer)
    assert automatic(again, found).patch == ()
    assert not validate(again, found).warnings


def test_auto_leaves_pods_alone_that_ask_for_nothing_or_have_their_sidecar() -> None:
    assert automatic(pod(), around(ACCEPTED)) == Answer()
    injected = pod(f'{AUTO}, sidecar.istio.io/status: "{{}}"', extra=", {name: istio-proxy}")
    assert automatic(injected, around(ACCEPTED)) == Answer()


def test_auto_says_why_a_port_stays() -> None:
    answer = automatic(pod(AUTO), around())
    assert answer.patch == ()
    assert answer.warnings[0] == "inbound TCP 8080 stays with Envoy: it would lose encryption, which nobody accepted"
    assert "8080" in answer.audit["refused"]
    outside = pod(AUTO).replace("namespace: shop", "namespace: plain")
    assert "gets no sidecar" in automatic(outside, around(ACCEPTED)).warnings[0]


SERVICE = (
    "{apiVersion: v1, kind: Service, metadata: {name: api, namespace: shop}, "
    "spec: {selector: {app: api}, ports: [{port: 80, targetPort: 8080}], clusterIP: 10.96.0.1}}\n"
)


def network_policy(peer: str) -> str:
    metadata = "metadata: {name: n, namespace: shop}"
    spec = f"{{podSelector: {{}}, ingress: [{{from: [{peer}]}}]}}"
    return f"{{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, {metadata}, spec: {spec}}}\n"


def destination_rule(selector: str) -> str:
    metadata = "metadata: {name: plain, namespace: other}"
    spec = f"{{host: api.shop.svc.cluster.local, workloadSelector: {{matchLabels: {selector}}}, "
    spec += "trafficPolicy: {tls: {mode: DISABLE}}}"
    return f"{{apiVersion: networking.istio.io/v1, kind: DestinationRule, {metadata}, spec: {spec}}}\n"


X, Y = client("c", labels="team: x"), client("d", labels="team: y", address="10.1.0.1")
CLIENTS = {
    "no client": [],
    "one of another namespace": [client("c")],
    "many of one kind": [client(f"c-{n}", address=f"10.0.1.{n}") for n in range(1, 20)],
    "one that a policy keeps away": [X, network_policy("{podSelector: {}}")],
    "two, told apart by a policy": [
        X, Y, network_policy("{namespaceSelector: {}, podSelector: {matchLabels: {team: y}}}")],
    "two, told apart by a CIDR": [X, Y, network_policy("{ipBlock: {cidr: 10.1.0.0/16}}")],
    "both sent plaintext by a DestinationRule": [X, destination_rule("{team: x}")],
    "one of two sent plaintext": [X, Y, destination_rule("{team: x}")],
    "as many, the other": [X, Y, destination_rule("{team: y}")],
}  # fmt: skip


@pytest.mark.parametrize("objects", CLIENTS.values(), ids=CLIENTS.keys())
def test_auto_decides_as_an_analysis_of_the_whole_cluster_does(objects: list[str]) -> None:
    texts = [ACCEPTED, SERVICE, *objects, pod(AUTO)]
    whole = inventory(read_objects((NAMESPACES + "---\n".join(texts)).encode(), "").documents, now=NOW)
    expected = automatic_exclusions(next(w for w in whole.workloads if w.name == "api"), whole)
    answer = automatic(pod(AUTO), around(ACCEPTED, SERVICE, *objects))
    assert [operation["value"] for operation in answer.patch] == [value for _, value in expected.annotations]
    assert len(answer.warnings) == len(expected.refused)


def test_pods_that_come_and_go_are_counted_by_kind() -> None:
    def excluded() -> str:
        return "".join(operation["value"] for operation in automatic(pod(AUTO), found).patch)

    found = around(ACCEPTED, SERVICE, client("c"), client("d", address="10.0.0.10"))
    assert excluded() == "9090"
    for name, ports in (("c", "9090"), ("d", "8080,9090")):
        found.apply({("", "Pod", "other", name): ()}, DEFAULT_MESH, None)
        assert excluded() == ports
    (again,) = read_objects(client("e").encode(), "").documents
    found.apply({again.key: (again,)}, DEFAULT_MESH, None)
    assert excluded() == "9090"


def test_warnings_fit_and_what_is_left_out_is_counted() -> None:
    answer = Answer(tuple(f"{n}{'ä' * 400}\n" for n in range(20)))
    warnings = answered(read_request(sent(pod())), answer)["response"]["warnings"]
    assert len(warnings) == MAX_WARNINGS
    assert all(len(warning) <= MAX_WARNING and warning.isprintable() for warning in warnings)
    assert warnings[-1].startswith("and 13 more")


MALFORMED = {
    "no mapping": [],
    "nothing": {},
    "another version": {"apiVersion": "admission.k8s.io/v1beta1", "kind": "AdmissionReview", "request": {}},
    "no request": {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview"},
    "no object": {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {"uid": "u"}},
    "a uid that is none": {**sent(pod()), "request": {**sent(pod())["request"], "uid": 1}},
    "a kind that is none": {
        **sent(pod()),
        "request": {**sent(pod())["request"], "object": {"kind": {}, "metadata": {}}},
    },
}  # fmt: skip


@pytest.mark.parametrize("review", MALFORMED.values(), ids=MALFORMED.keys())
def test_what_is_no_review_is_refused(review: Any) -> None:
    with pytest.raises(ReviewError):
        read_request(review)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["metadata", "spec", "annotations", "ports", "name", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(
    st.sampled_from(["Pod", "Deployment", "BypassPolicy", "NetworkPolicy", "AuthorizationPolicy", "x"]),
    st.sampled_from(["v1", "apps/v1", "meshbridge.io/v1alpha1", "networking.k8s.io/v1", "security.istio.io/v1", "/"]),
    JSON,
    JSON,
)
def test_any_content_of_an_object_is_answered(kind: str, version: str, metadata: Any, spec: Any) -> None:
    metadata = metadata if isinstance(metadata, dict) else {}
    metadata["name"] = "n"
    given = {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec}
    request = {"uid": "u", "operation": "CREATE", "object": given}
    found = around(ACCEPTED)
    try:
        asked = read_request({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request})
    except ReviewError:
        return
    for answer in (validated(asked, found, NOW), mutate(asked, found, NOW)):
        json.dumps(answered(asked, answer))


def custom(provider: str, selector: str = "", name: str = "mine", namespace: str = "shop") -> str:
    metadata = f"{{name: {name}, namespace: {namespace}}}"
    selected = f"selector: {{matchLabels: {{{selector}}}}}, " if selector else ""
    spec = f"{{{selected}action: CUSTOM, provider: {{name: {provider}}}, rules: [{{}}]}}"
    return f"{{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {metadata}, spec: {spec}}}\n"


MEETINGS = {
    "the same pods": (custom("meshbridge", "app: api"), custom("opa", "app: api", "theirs"), "denied"),
    "ours selects more": (custom("meshbridge"), custom("opa", "app: api", "theirs"), "denied"),
    "theirs selects more": (custom("meshbridge", "app: api"), custom("opa", "", "theirs"), "denied"),
    "theirs for the mesh": (custom("meshbridge", "app: api"), custom("opa", "", "t", "istio-system"), "denied"),
    "ours for the mesh": (custom("meshbridge", namespace="istio-system"), custom("opa", "app: api", "t"), "denied"),
    "a pod has both labels": (custom("meshbridge", "app: api"), custom("opa", "tier: a", "theirs"), "denied"),
    "no pod has both labels": (custom("meshbridge", "app: api"), custom("opa", "tier: b", "theirs"), "warned"),
    "pods that cannot be the same": (custom("meshbridge", "app: api"), custom("opa", "app: db", "theirs"), ""),
    "another namespace": (custom("meshbridge"), custom("opa", "", "theirs", "other"), ""),
    "the same provider": (custom("meshbridge"), custom("meshbridge", "", "theirs"), ""),
    "its older self": (custom("meshbridge"), custom("opa"), ""),
    "their provider comes to ours": (custom("opa", "app: api"), custom("meshbridge", "", "theirs"), "warned"),
    "two of others": (custom("opa", "app: api"), custom("oauth", "", "theirs"), "warned"),
}


@pytest.mark.parametrize(("applied", "present", "expected"), MEETINGS.values(), ids=MEETINGS.keys())
def test_our_provider_is_refused_where_it_would_make_istio_deny_everything(
    applied: str, present: str, expected: str
) -> None:
    both = pod().replace("labels: {app: api}", "labels: {app: api, tier: a}")
    answer = validate(applied, around(both, present))
    assert ("denied" if answer.denied else "warned" if answer.warnings else "") == expected, answer
    if answer.denied:
        assert answer.code == 403
        assert "by 'meshbridge ext-authz envoyfilter'" in answer.denied


GATED = "{selector: {matchLabels: {app: api}}, proof: true, readinessGate: true}"
OWN_GATE = {"conditionType": "meshbridge.io/compensated"}
GATES = {
    "one that asks for it": (GATED, "", [{"op": "add", "path": "/spec/readinessGates", "value": [OWN_GATE]}]),
    "with gates of its own": (
        GATED, ", readinessGates: [{conditionType: a}]",
        [{"op": "add", "path": "/spec/readinessGates/-", "value": OWN_GATE}],
    ),
    "with this gate already": (GATED, ", readinessGates: [{conditionType: meshbridge.io/compensated}]", []),
    "one that asks for a proof only": ("{proof: true}", "", []),
    "one that selects another pod": (GATED.replace("api", "web"), "", []),
    "one that is not understood": ("{readinessGate: true}", "", []),
    "a pod that nobody hooks": (GATED, ", hostNetwork: true", []),
}  # fmt: skip


@pytest.mark.parametrize(("spec", "extra", "patch"), GATES.values(), ids=GATES.keys())
def test_a_pod_gets_the_gate_that_a_policy_asks_for(spec: str, extra: str, patch: list[dict[str, Any]]) -> None:
    found = around(bypass_policy(spec))
    written = yaml.safe_load(pod())
    written["spec"] |= yaml.safe_load("{" + extra.removeprefix(", ") + "}") or {}
    assert list(gate(read_request(sent(yaml.dump(written))), found, NOW).patch) == patch


def test_before_the_cluster_is_read_no_gate_is_given_and_the_audit_log_says_so() -> None:
    answer = gate(read_request(sent(pod())), Surroundings(), NOW)
    assert answer.patch == ()
    assert "not read the whole cluster" in answer.audit["gate"]


REQUIRING = bypass_policy(
    "{accept: [encryption, identity, telemetry, l7], reason: r, otherwise: deny, requireNodeEncryption: true}"
)
ENCRYPTING = (
    "{apiVersion: v1, kind: ConfigMap, metadata: {name: cilium-config, namespace: kube-system}, "
    "data: {enable-wireguard: 'true'}}\n"
)


def cilium_node(name: str, key: str = "") -> str:
    metadata = f"{{name: {name}, annotations: {{network.cilium.io/wg-pub-key: '{key}'}}}}"
    return f"{{apiVersion: cilium.io/v2, kind: CiliumNode, metadata: {metadata}}}\n"


def test_a_pod_is_refused_where_its_policy_requires_encryption_that_nothing_says_there_is() -> None:
    excluded = pod(f'{IN}: "8080"')
    assert "loses encryption" in validate(excluded, around(REQUIRING)).denied
    found = around(REQUIRING, ENCRYPTING, cilium_node("a", "k"))
    assert not validate(excluded, found).denied
    added = read_objects(cilium_node("b").encode(), "").documents
    found.apply({document.key: (document,) for document in added}, DEFAULT_MESH, None)
    assert "loses encryption" in validate(excluded, found).denied
    found.apply({document.key: () for document in added}, DEFAULT_MESH, None)
    assert not validate(excluded, found).denied

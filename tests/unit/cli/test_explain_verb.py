"""``meshbridge explain`` as a person runs it: what is printed, how wide, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from meshbridge.cli.evaluate import command as evaluate
from meshbridge.cli.explain import command

MANIFESTS = """\
apiVersion: v1
kind: Namespace
metadata: {name: finance, labels: {istio-injection: enabled}}
---
apiVersion: v1
kind: Namespace
metadata: {name: marketing}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: finance, labels: {app: client}}
spec: {nodeName: one, serviceAccountName: client, containers: [{name: app}]}
status: {phase: Running, podIPs: [{ip: 10.1.0.1}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: marketing, labels: {app: client}}
spec: {nodeName: one, containers: [{name: app}]}
status: {phase: Running, podIPs: [{ip: 10.1.0.2}]}
---
apiVersion: v1
kind: Pod
metadata:
  name: ledger
  namespace: finance
  labels: {app: ledger}
  annotations: {traffic.sidecar.istio.io/excludeInboundPorts: "9090"}
spec: {nodeName: two, containers: [{name: app, ports: [{name: http, containerPort: 8080}]}]}
status: {phase: Running, podIPs: [{ip: 10.1.0.3}]}
---
apiVersion: v1
kind: Pod
metadata: {name: ledger-2, namespace: finance, labels: {app: ledger, old: "yes"}}
spec: {nodeName: two, containers: [{name: app, ports: [{name: http, containerPort: 8080}]}]}
status: {phase: Running, podIPs: [{ip: 10.1.0.4}]}
---
apiVersion: v1
kind: Service
metadata: {name: ledger, namespace: finance}
spec:
  clusterIP: 10.96.0.1
  selector: {app: ledger}
  ports: [{name: http, port: 80, targetPort: http}, {name: metrics, port: 9090}]
"""
L4 = """\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: ledger-l4, namespace: finance}
spec:
  endpointSelector: {matchLabels: {app: ledger}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: client}}]
    toPorts: [{ports: [{port: "8080"}, {port: "9090"}]}]
"""
L7 = """\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: ledger-l7, namespace: finance}
spec:
  selector: {matchLabels: {app: ledger}}
  rules:
  - from: [{source: {principals: [cluster.local/ns/finance/sa/client]}}]
    to: [{operation: {methods: [GET]}}]
    when: [{key: "request.auth.claims[scope]", values: [read]}]
"""
REFUSED = """\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: odd, namespace: finance}
spec: {podSelector: {}, ingress: [{from: [{ipBlock: {cidr: nowhere}}]}]}
"""
OWN = "spiffe://cluster.local/ns/finance/sa/client"


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    for name, text in (("pods", MANIFESTS), ("l4", L4), ("l7", L7)):
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def run(manifests: Path, source: str, destination: str, *options: str) -> Result:
    return CliRunner().invoke(command, ["-f", str(manifests), "--from", source, "--to", destination, *options])


def flat(result: Result) -> str:
    """The text without its layout."""
    return " ".join(result.stdout.split())


def test_the_nearest_rule_is_named_with_its_place_and_what_it_wants(manifests: Path) -> None:
    done = run(manifests, "marketing/client", "finance/ledger:8080")
    assert done.exit_code == 1
    assert (
        f"nearest CiliumNetworkPolicy finance/ledger-l4 spec.ingress[0] ({manifests}/l4.yaml:7) would allow it, but "
        "it wants namespace=finance: the source has namespace=marketing"
    ) in flat(done)
    assert done.stdout.splitlines()[-1] == "DENY       stopped by ingress policy"


def test_a_default_deny_names_the_policies_that_isolate(manifests: Path) -> None:
    text = flat(run(manifests, "marketing/client", "finance/ledger:8080"))
    assert "no rule allows it, and it is isolated by CiliumNetworkPolicy finance/ledger-l4 spec.ingress[0]" in text


def test_every_layer_is_shown_in_order_and_what_is_not_reached_is_marked(manifests: Path) -> None:
    record = json.loads(run(manifests, "finance/client", "finance/ledger:8080", "-o", "json").stdout)
    assert [step["stage"] for step in record["steps"]] == [
        "egress policy", "redirect at the source", "delivery by mutual TLS", "ingress policy",
        "redirect at the destination", "mesh policy in the kernel", "mesh policy in Envoy",
    ]  # fmt: skip
    stopped = run(manifests, "marketing/client", "finance/ledger:8080").stdout
    assert "4. ingress policy:" in stopped
    assert "7. mesh policy in Envoy (not reached):" in stopped


SAID = ["--method", "GET", "--path", "/", "--host", "h"]
VERDICTS: dict[str, tuple[list[str], int, str]] = {
    "all is said and holds": ([*SAID, "--claim", "scope=read", "--principal", OWN], 0, "every policy on its way"),
    "the method is another": (
        [*SAID[2:], "--method", "PUT", "--claim", "scope=read", "--principal", OWN], 1,
        "it wants methods GET: the request is PUT",
    ),
    "a claim is another": (
        [*SAID, "--claim", "scope=write", "--principal", OWN], 1,
        "it wants request.auth.claims[scope] read: the request has claim scope=write",
    ),
    "there is no token": ([*SAID, "--token", "absent", "--principal", OWN], 1, "the request has no valid token"),
    "the source sends plaintext": (
        [*SAID, "--claim", "scope=read", "--principal", "none"], 1,
        "it wants source.principal cluster.local/ns/finance/sa/client: the source sends plaintext",
    ),
    "the source's certificate is not said": (
        [*SAID, "--claim", "scope=read"], 3, f"the source's own proxy makes it ALLOW, presenting {OWN}",
    ),
    "nothing is said": ([], 3, "(say it with --claim or --token, --method, --principal)"),
}  # fmt: skip


@pytest.mark.parametrize(("options", "code", "told"), VERDICTS.values(), ids=VERDICTS.keys())
def test_the_exit_code_is_the_verdict(manifests: Path, options: list[str], code: int, told: str) -> None:
    done = run(manifests, "finance/client", "finance/ledger:8080", *options)
    assert done.exit_code == code
    assert told in flat(done)


@pytest.mark.parametrize("options", [options for options, _, _ in VERDICTS.values()], ids=VERDICTS.keys())
def test_the_flow_in_json_is_a_question_that_evaluate_answers_alike(manifests: Path, options: list[str]) -> None:
    record = json.loads(run(manifests, "finance/client", "finance/ledger:8080", *options, "-o", "json").stdout)
    flows = json.dumps(record["flow"])
    answer = CliRunner().invoke(evaluate, ["-f", str(manifests), "--flows", "-"], input=flows)
    assert json.loads(answer.stdout)["verdict"] == record["verdict"]


def test_a_bypassed_port_is_judged_in_the_kernel_and_the_half_bypass_is_told(manifests: Path) -> None:
    (manifests / "l7.yaml").unlink()
    done = run(manifests, "finance/client", "finance/ledger:9090")
    assert done.exit_code == 1
    assert "bypassed 5. redirect at the destination (not reached): excludeInboundPorts (annotation" in flat(done)
    assert "DENY 3. delivery by mutual TLS: the client's Envoy sends mutual TLS, and the server's does not" in flat(
        done
    )
    assert "ALLOW 6. mesh policy in the kernel (not reached)" in flat(done)


DENIES = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: no-clients, namespace: finance}
spec: {endpointSelector: {}, ingressDeny: [{fromEndpoints: [{matchLabels: {app: client}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-get, namespace: finance}
spec: {action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}]}
"""


def test_a_deny_says_what_would_be_without_it(manifests: Path) -> None:
    (manifests / "deny.yaml").write_text(DENIES)
    options = [*SAID, "--claim", "scope=read", "--principal", OWN]
    text = flat(run(manifests, "finance/client", "finance/ledger:8080", *options))
    assert f"no-clients spec.ingressDeny[0] ({manifests}/deny.yaml:5) without that rule it would be ALLOW" in text
    assert f"no-get spec.rules[0] ({manifests}/deny.yaml:10) without that rule it would be ALLOW" in text


def test_an_http_rule_of_a_network_policy_says_which_field_is_another(manifests: Path) -> None:
    (manifests / "l7.yaml").unlink()
    http = '[{method: GET, path: "/v1/.*"}, {method: PUT, path: /x, headers: [x-a]}]'
    ports = f'{{ports: [{{port: "8080", protocol: TCP}}], rules: {{http: {http}}}}}'
    (manifests / "l4.yaml").write_text(L4.replace('{ports: [{port: "8080"}, {port: "9090"}]}', ports))
    done = run(manifests, "finance/client", "finance/ledger:8080", "--method", "GET", "--path", "/v2", "--host", "h")
    assert done.exit_code == 1
    assert "DENY 7. HTTP rules in ext_authz: denied by CiliumNetworkPolicy finance/ledger-l4" in flat(done)
    assert "would allow it, but it wants path /v1/.*: the request has /v2" in flat(done)
    assert done.stdout.splitlines()[-1] == "DENY       stopped by HTTP rules in ext_authz"


def test_of_a_service_whose_backends_differ_the_one_that_is_denied_is_explained(manifests: Path) -> None:
    (manifests / "out.yaml").write_text("""
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: out, namespace: finance}
spec:
  podSelector: {matchLabels: {app: client}}
  policyTypes: [Egress]
  egress: [{to: [{podSelector: {matchLabels: {old: "yes"}}}]}]
""")
    done = run(manifests, "finance/client", "10.96.0.1:80")
    assert done.exit_code == 1
    assert "DENY 1. egress policy: not every backend of the Service may be reached:" in flat(done)
    assert f"NetworkPolicy finance/out spec.egress[0] ({manifests}/out.yaml:8) would allow it, but " \
        "it wants old=yes: the destination has no old" in flat(done)  # fmt: skip


def test_a_provider_that_is_asked_leaves_a_flow_open(manifests: Path) -> None:
    custom = L7.replace("  rules:", "  action: CUSTOM\n  provider: {name: other}\n  rules:").partition("  - from")[0]
    (manifests / "l7.yaml").write_text(f"{custom}  - to: [{{operation: {{methods: [GET]}}}}]\n")
    done = run(manifests, "finance/client", "finance/ledger:8080", *SAID, "--principal", OWN)
    assert done.exit_code == 3
    assert "denies it given the answer of provider other" in flat(done)


def test_a_refused_policy_that_concerns_the_flow_is_shown_with_its_reason(manifests: Path) -> None:
    (manifests / "odd.yaml").write_text(REFUSED)
    text = flat(run(manifests, "finance/client", "finance/ledger:8080"))
    assert f"refused {manifests}/odd.yaml:4: NetworkPolicy finance/odd spec.ingress[0].from[0].ipBlock.cidr:" in text


def test_of_the_pods_behind_a_service_the_strictest_is_explained(manifests: Path) -> None:
    (manifests / "old.yaml").write_text(L7.replace("ledger-l7", "old").replace("app: ledger", "old: 'yes'").replace(
        "  rules:", "  action: DENY\n  rules:").replace("methods: [GET]", "ports: ['8080']").partition("    when")[0]
        .replace("principals: [cluster.local/ns/finance/sa/client]", "ipBlocks: [10.1.0.0/16]"))  # fmt: skip
    done = run(manifests, "finance/client", "10.96.0.1:80", *SAID, "--claim", "scope=read", "--principal", OWN)
    assert done.exit_code == 1
    assert "to 10.96.0.1, Service finance/ledger behind it finance/ledger-2" in flat(done)
    assert "of 2 behind it the one treated most strictly" in flat(done)


def test_all_rules_that_came_close_are_shown_on_request(manifests: Path) -> None:
    (manifests / "more.yaml").write_text(L4.replace("ledger-l4", "more").replace("app: client", "app: other"))
    short, long = (run(manifests, "marketing/client", "finance/ledger:8080", *o).stdout for o in ([], ["--all"]))
    assert "1 more with --all" in short
    assert long.count("CiliumNetworkPolicy finance/more spec.ingress[0]") == 2  # isolates, and came close


def test_no_line_is_wider_than_a_hundred_columns_and_none_is_coloured_in_a_pipe(manifests: Path) -> None:
    for options in ([], ["--all"], SAID):
        done = run(manifests, "marketing/client", "finance/ledger:8080", *options)
        places = [word for word in done.stdout.split() if len(word) > 80]
        assert all(len(line) <= 100 for line in done.stdout.splitlines() if not any(p in line for p in places))
        assert "\x1b" not in done.stdout


def test_names_from_outside_cannot_forge_lines(manifests: Path) -> None:
    done = run(manifests, "finance/client", "finance/ledger:8080", "--method", "PUT\nALLOW  \x1b[32mforged",
               "--principal", OWN, *SAID[2:], "--claim", "scope=read")  # fmt: skip
    assert "\x1b" not in done.stdout
    assert "PUT\\x0aALLOW" in flat(done)


BAD: dict[str, tuple[str, str, list[str], str]] = {
    "no port": ("finance/client", "finance/ledger", [], "--to: 'finance/ledger' names no port"),
    "a port out of range": ("finance/client", "finance/ledger:65536", [], "--to: 65536 is no port"),
    "no such pod": ("finance/nobody", "finance/ledger:80", [], "--from: no pod 'finance/nobody'"),
    "only the beginning of a pod's name": ("finance/cli", "finance/ledger:80", [], "is known; there is finance/client"),
    "a header without a value": ("finance/client", "finance/ledger:80", ["--header", "x"], "--header: 'x' has no '='"),
}


@pytest.mark.parametrize(("source", "destination", "options", "told"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_asked_is_neither_allowed_nor_denied(
    manifests: Path, source: str, destination: str, options: list[str], told: str
) -> None:
    done = run(manifests, source, destination, *options)
    assert done.exit_code == 2
    assert told in done.stderr
    assert done.stdout == ""


def test_json_holds_all_that_the_text_says(manifests: Path) -> None:
    record: dict[str, Any] = json.loads(run(manifests, "marketing/client", "finance/ledger:8080", "-o", "json").stdout)
    ingress = record["steps"][3]
    assert record["decided_by"] == ingress["stage"] == "ingress policy"
    assert ingress["near"] == [{
        "policy": "finance/ledger-l4", "kind": "CiliumNetworkPolicy", "rule": "spec.ingress[0]",
        "file": f"{manifests}/l4.yaml", "line": 7, "verdict": "ALLOW", "isolates": False, "depends": [],
        "mismatches": [{"of": "source", "wants": "namespace=finance", "has": "has namespace=marketing"}],
    }]  # fmt: skip

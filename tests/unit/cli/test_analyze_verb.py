"""``meshbridge analyze`` as a person runs it: thresholds, suppression, forms of output, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from meshbridge.analysis.codes import CODES
from meshbridge.analysis.suppression import SuppressionError
from meshbridge.cli.analyze import command

POD = """
apiVersion: v1
kind: Pod
metadata: {name: api, namespace: shop, labels: {app: api}}
spec: {containers: [{name: app, ports: [{containerPort: 8080}]}]}
"""
SELECTS_NOTHING = """
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec: {podSelector: {matchLabels: {app: apis}}, ingress: [{}]}
"""
REFUSED = """
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: bad, namespace: shop}
spec: {podSelector: {}, ingress: [{form: []}]}
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("warning.yaml").write_text(POD + SELECTS_NOTHING)
    Path("error.yaml").write_text(POD + SELECTS_NOTHING + REFUSED)
    Path("clean.yaml").write_text(POD)
    return tmp_path


def run(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(command, arguments, input=stdin)


def codes(result: Result) -> list[str]:
    return [found["code"] for found in json.loads(result.stdout)]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["clean.yaml"], 0),
        (["warning.yaml"], 0),
        (["error.yaml"], 79),
        (["error.yaml", "-o", "json"], 79),
        (["error.yaml", "--output-threshold", "error"], 79),
        (["error.yaml", "-S", "MB0003=shop/bad"], 0),
        (["warning.yaml", "--failure-threshold", "warning"], 79),
        (["warning.yaml", "--failure-threshold", "Warning", "--output-threshold", "ERROR"], 79),
        (["-n", "pay", "error.yaml"], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
@pytest.mark.usefixtures("files")
def test_the_exit_code_is_istioctls(arguments: list[str], expected: int) -> None:
    assert run(*arguments).exit_code == expected


@pytest.mark.usefixtures("files")
def test_a_line_says_severity_code_object_place_and_text() -> None:
    first, second = run("-f", "warning.yaml").stdout.splitlines()
    assert first.startswith("Warning [MB0401] (NetworkPolicy shop/web warning.yaml:8) selects no pod: ")
    assert second == "    fix: did you mean app=api?"


@pytest.mark.usefixtures("files")
def test_nothing_found_is_said_so() -> None:
    done = run("clean.yaml")
    assert (done.stdout, done.stderr) == ("", "✔ No issues found when analyzing clean.yaml.\n")


@pytest.mark.usefixtures("files")
def test_the_output_threshold_hides_and_does_not_forgive() -> None:
    done = run("error.yaml", "-o", "json", "--output-threshold", "error")
    assert codes(done) == ["MB0003"]
    assert done.exit_code == 79


@pytest.mark.parametrize(
    "pattern",
    [
        "MB0401=shop/web", "MB0401=*/web", "MB0401=NetworkPolicy web.shop", "MB0401=NetworkPolicy *.shop",
        "MB0401=NetworkPolicy shop/web", "MB04*=shop/*",
    ],
)  # fmt: skip
@pytest.mark.usefixtures("files")
def test_a_finding_is_suppressed_by_code_and_object(pattern: str) -> None:
    assert codes(run("warning.yaml", "-o", "json", "-S", pattern)) == []


@pytest.mark.parametrize("pattern", ["MB0402=shop/web", "MB0401=shop/api", "MB0401=NetworkPolicy web.pay"])
@pytest.mark.usefixtures("files")
def test_other_objects_and_codes_are_not_suppressed(pattern: str) -> None:
    assert codes(run("warning.yaml", "-o", "json", "-S", pattern)) == ["MB0401"]


@pytest.mark.usefixtures("files")
def test_an_unknown_code_is_told_and_an_unreadable_suppression_is_an_error() -> None:
    assert "there is no code IST0101" in run("clean.yaml", "-S", "IST0101=x/y").stderr
    done = run("clean.yaml", "-S", "MB0401")
    assert isinstance(done.exception, SuppressionError)


@pytest.mark.parametrize(("value", "left"), [("MB0401", []), ("MB0501, MB0401", []), ("*", []), ("MB0501", ["MB0401"])])
@pytest.mark.usefixtures("files")
def test_an_annotation_suppresses_findings_about_its_object(value: str, left: list[str]) -> None:
    text = (POD + SELECTS_NOTHING).replace(
        "{name: web,", f'{{annotations: {{meshbridge.io/analyze-suppress: "{value}"}}, name: web,'
    )
    Path("annotated.yaml").write_text(text)
    assert codes(run("annotated.yaml", "-o", "json")) == left


@pytest.mark.usefixtures("files")
def test_a_file_that_cannot_be_read_is_a_finding_and_the_others_are_analyzed() -> None:
    Path("broken.yaml").write_text("a: [")
    done = run("broken.yaml", "warning.yaml", "-o", "json")
    assert codes(done) == ["MB0001", "MB0401"]
    assert done.exit_code == 65
    assert run("broken.yaml", "error.yaml").exit_code == 79


@pytest.mark.usefixtures("files")
def test_yaml_and_json_say_the_same() -> None:
    as_json, as_yaml = (run("error.yaml", "-o", form).stdout for form in ("json", "yaml"))
    assert yaml.safe_load(as_yaml) == json.loads(as_json)


@pytest.mark.usefixtures("files")
def test_directories_and_standard_input_are_read() -> None:
    assert codes(run("-f", ".", "-o", "json")).count("MB0003") == 1
    assert codes(run("-f", "-", "-o", "json", stdin=POD + SELECTS_NOTHING)) == ["MB0401"]


@pytest.mark.usefixtures("files")
def test_names_cannot_forge_lines_or_colours() -> None:
    Path("evil.yaml").write_text(POD + SELECTS_NOTHING.replace("apis", "a").replace("ingress: [{}]", 'x: "\\e[31m\\n"'))
    done = run("evil.yaml")
    assert "\x1b" not in done.stdout
    assert all(line.startswith(("Error [", "    fix: ")) for line in done.stdout.splitlines())


@pytest.mark.usefixtures("files")
def test_colours_only_where_they_are_wanted() -> None:
    assert "\x1b[" not in run("warning.yaml").stdout
    done = CliRunner().invoke(command, ["warning.yaml", "--color"], color=True)
    assert done.stdout.startswith("\x1b[33mWarning\x1b[0m [MB0401]")


def test_codes_and_analyzers_are_listed_without_reading_anything() -> None:
    listed = run("--list-codes").stdout
    assert all(code in listed for code in CODES)
    assert "isolation.DefaultDeny" in run("-L").stdout


@pytest.mark.usefixtures("files")
def test_sarif_names_every_rule_and_points_at_lines() -> None:
    log = json.loads(run("error.yaml", "-o", "sarif").stdout)
    assert (log["version"], len(log["runs"])) == ("2.1.0", 1)
    run_of_it = log["runs"][0]
    rules = run_of_it["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == list(CODES)
    for rule in rules:
        assert rule["helpUri"].endswith(rule["id"])
        assert all(rule[text]["text"] for text in ("shortDescription", "fullDescription", "help"))
    results: list[dict[str, Any]] = run_of_it["results"]
    assert {(r["ruleId"], r["level"]) for r in results} == {("MB0003", "error"), ("MB0401", "warning")}
    for result in results:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        place = result["locations"][0]["physicalLocation"]
        assert place["artifactLocation"]["uri"] == "error.yaml"
        assert place["region"]["startLine"] > 1


@pytest.mark.usefixtures("files")
def test_a_fingerprint_survives_moved_lines() -> None:
    def prints(text: str) -> list[str]:
        Path("moved.yaml").write_text(text)
        results = json.loads(run("moved.yaml", "-o", "sarif").stdout)["runs"][0]["results"]
        return [result["partialFingerprints"]["meshbridge/v1"] for result in results]

    assert prints(POD + SELECTS_NOTHING) == prints(f"# a comment\n{POD}{SELECTS_NOTHING}") != []

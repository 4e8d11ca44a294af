"""istio-init's arguments and environment mean what its own flag library makes of them (ISTIO.md §c, surprise 14)."""

from __future__ import annotations

import pytest

from meshbridge.bypass.findings import FindingCode
from meshbridge.bypass.initargs import MAX_ARGUMENTS, parse_init_args

FORMS = {
    "short form with a blank": ["-b", "80"],
    "short form without a blank": ["-b80"],
    "short form with an equals sign": ["-b=80"],
    "long form with a blank": ["--istio-inbound-ports", "80"],
    "long form with an equals sign": ["--istio-inbound-ports=80"],
    "of a repeated flag the last wins": ["-b", "*", "--istio-inbound-ports=1", "-b80"],
    "a boolean before it in the same word": ["-nb80", "--dry-run=false"],
    "the program's name first": ["istio-iptables", "-b", "80"],
    "flags of the logger beside it": ["--log_output_level=default:info", "--log_as_json", "-b", "80"],
    "what follows -- is not read": ["-b", "80", "--", "-b", "90"],
}


@pytest.mark.parametrize("arguments", FORMS.values(), ids=FORMS.keys())
def test_every_way_to_write_a_flag_means_the_same(arguments: list[str]) -> None:
    config, findings = parse_init_args(arguments, {})
    assert config.include_inbound_ports == "80"
    assert config.writes_rules
    assert not findings


def test_a_missing_list_is_none_and_not_all() -> None:
    config, _ = parse_init_args(["-p", "15001"], {})
    assert (config.include_inbound_ports, config.include_outbound_ranges) == ("", "")


ENVIRONMENT = {
    "a variable sets what no flag says": ([], {"ISTIO_INBOUND_PORTS": "80"}, "80"),
    "an explicit flag beats the variable": (["-b", "90"], {"ISTIO_INBOUND_PORTS": "80"}, "90"),
    "an explicitly empty flag beats it too": (["-b", ""], {"ISTIO_INBOUND_PORTS": "80"}, ""),
}


@pytest.mark.parametrize(("arguments", "env", "expected"), ENVIRONMENT.values(), ids=ENVIRONMENT.keys())
def test_environment_counts(arguments: list[str], env: dict[str, str], expected: str) -> None:
    assert parse_init_args(arguments, env)[0].include_inbound_ports == expected


def test_the_envoy_port_has_no_variable() -> None:
    assert parse_init_args([], {"ENVOY_PORT": "1"})[0].proxy_port == "15001"


def test_boolean_variables_that_go_cannot_read_are_passed_over() -> None:
    assert not parse_init_args([], {"ISTIO_DUAL_STACK": "yes"})[0].dual_stack
    assert parse_init_args([], {"ISTIO_DUAL_STACK": "T"})[0].dual_stack
    assert parse_init_args([], {"ISTIO_META_DNS_CAPTURE": "true"})[0].redirect_dns


FATAL = {
    "an unknown flag": ["--no-such-flag"],
    "an unknown short flag": ["-Z", "1"],
    "a flag without its value": ["-b"],
    "a boolean that is none": ["--dry-run=maybe"],
    "more arguments than anybody writes": ["x"] * (MAX_ARGUMENTS + 1),
}


@pytest.mark.parametrize("arguments", FATAL.values(), ids=FATAL.keys())
def test_what_ends_the_program_means_that_the_pod_never_starts(arguments: list[str]) -> None:
    _, findings = parse_init_args(arguments, {})
    assert FindingCode.NEVER_STARTS in {finding.code for finding in findings}


@pytest.mark.parametrize("flag", ["--skip-rule-apply", "--dry-run", "--cleanup-only", "-n"])
def test_some_flags_keep_it_from_writing_rules(flag: str) -> None:
    assert not parse_init_args([flag, "-b", "*"], {})[0].writes_rules


def test_every_value_knows_what_set_it() -> None:
    config, _ = parse_init_args(["-d", "15090,9090"], {"ISTIO_INBOUND_PORTS": "*"})
    assert config.source("exclude_inbound_ports") == 'istio-init argument -d "15090,9090"'
    assert config.source("include_inbound_ports") == 'istio-init environment ISTIO_INBOUND_PORTS="*"'

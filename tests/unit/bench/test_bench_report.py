"""What a run hands to people and to programs."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from meshbridge.bench.figures import Column, Failure, Report, Section, Target, markdown, table
from meshbridge.bench.iptables import Backend, RuleList, restore_text
from meshbridge.bench.network import stale_names
from meshbridge.bench.runner import PARTS
from meshbridge.cli.bench import command


def section(*targets: Target) -> Section:
    columns = (Column("variant", "path"), Column("p50", "p50 µs", ".1f"))
    return Section(
        "s", "A table", columns, [{"variant": "ours", "p50": 1.26}, {"variant": "none", "p50": None}], targets
    )


def test_table_shows_numbers_in_their_form_and_missing_ones_as_a_dash() -> None:
    assert table(section()) == [["path", "p50 µs"], ["ours", "1.3"], ["none", "–"]]


TARGETS = {
    "below the limit": (1.04, True),
    "at the limit": (1.05, True),
    "above the limit": (1.051, False),
}


@pytest.mark.parametrize(("measured", "met"), TARGETS.values(), ids=TARGETS.keys())
def test_target_is_met_up_to_its_limit(measured: float, met: bool) -> None:
    target = Target("our p50", measured, 1.05)
    assert target.met is met
    assert str(target).startswith("met:" if met else "MISSED:")


def test_report_is_json_and_says_which_targets_were_missed() -> None:
    missed = Target("our p50", 1.2, 1.05)
    report = Report({"cpu": "x"}, True, [section(missed, Target("flat", 1.0, 1.1))], [Failure("agent", "not there")])
    record = json.loads(json.dumps(report.record()))
    assert report.missed == [missed]
    assert [target["met"] for target in record["sections"][0]["targets"]] == [False, True]
    assert record["sections"][0]["rows"][1] == {"variant": "none", "p50": None}
    assert record["failures"] == [{"name": "agent", "reason": "not there"}]


def test_markdown_shows_every_figure_and_puts_missed_targets_in_bold() -> None:
    text = markdown(Report({"cpu": "x"}, False, [section(Target("our p50", 1.2, 1.05))], [Failure("agent", "gone")]))
    lines = text.splitlines()
    assert "| path | p50 µs |" in lines
    assert "| ours | 1.3 |" in lines
    assert any(line.startswith("- **MISSED: our p50") for line in lines)
    assert lines[-1] == "agent: not measured: gone"


def test_rule_list_has_the_rules_asked_for_and_the_matching_ones_last() -> None:
    lines = restore_text(RuleList(10, Backend.NFT), "10.0.0.2", "10.0.0.3").splitlines()
    rules = [line for line in lines if line.startswith("-A")]
    assert len(rules) == 10
    assert "-s 10.0.0.2/32 -d 10.0.0.3/32" in rules[-1]
    assert ":FORWARD DROP [0:0]" in lines
    assert lines[-1] == "COMMIT"


def test_established_rule_comes_first() -> None:
    lines = restore_text(RuleList(10, Backend.LEGACY, established_first=True), "10.0.0.2", "10.0.0.3").splitlines()
    assert "ESTABLISHED" in next(line for line in lines if line.startswith("-A"))


STALE = {
    "of a run that ended": (["mbben-10-tcp0", "mbben-10-tcp0-client"], [11], ["mbben-10-tcp0", "mbben-10-tcp0-client"]),
    "not of one that runs": (["mbben-11-tcp0"], [11], []),
    "not somebody else's": (["mb-node-1", "mbbench-10-x", "mbben-ten-x", "mbben"], [], []),
}


@pytest.mark.parametrize(("names", "running", "expected"), STALE.values(), ids=STALE.keys())
def test_only_names_of_ended_runs_are_stale(names: list[str], running: list[int], expected: list[str]) -> None:
    assert stale_names(names, running) == expected


def test_list_names_every_part_without_measuring() -> None:
    done = CliRunner().invoke(command, ["--list"])
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.output.splitlines()] == list(PARTS)


def test_unknown_part_is_refused() -> None:
    done = CliRunner().invoke(command, ["--only", "nothing"])
    assert done.exit_code == 2
    assert "nothing" in done.output

"""What a person should know of a pod's redirection: values that are not what they look like, and contradictions."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

SHOWN: Final = 200


def shortened(value: str) -> str:
    """A value as it is quoted: a pod may carry a quarter of a megabyte of it."""
    return value if len(value) <= SHOWN else f"{value[:SHOWN]}…"


class Severity(StrEnum):
    ERROR = "error"  # the pod is refused or never starts, or reality is not what was asked for
    WARNING = "warning"
    INFO = "info"


class FindingCode(StrEnum):
    """Stable names, for JSON and for people who look one up."""

    INJECTOR_REFUSES = "injector-refuses"
    NEVER_STARTS = "never-starts"
    OCTAL_PORT = "octal-port"
    PORT_RANGE = "port-range"
    SERVICE_NAME = "service-name"
    UNKNOWN_PORT = "unknown-port"
    EXCLUDE_IGNORED = "exclude-ignored"
    DEFAULT_EXCLUSION_LOST = "default-exclusion-lost"
    CAPTURES_ISTIO_PORT = "captures-istio-port"
    MESH_WIDE = "mesh-wide-exclusion"
    MESH_WIDE_LOST = "mesh-wide-setting-lost"
    MODE_NONE_IN_ARGUMENTS = "mode-none-in-arguments"
    LOOPBACK_CAPTURED = "loopback-captured"
    REROUTE_IGNORES = "reroute-ignores-exclusions"
    IPV6_BYPASSES = "ipv6-bypasses"
    ANY_UID = "any-process-may-bypass"
    NO_REDIRECTION = "no-redirection"
    UNKNOWN_ARGUMENT = "unknown-argument"
    ARGUMENTS_CONTRADICT = "arguments-contradict-annotations"
    RULES_CONTRADICT = "rules-contradict"
    RULES_MISSING = "rules-missing"
    RULES_NOT_SEEN = "rules-not-seen"
    RULE_NOT_UNDERSTOOD = "rule-not-understood"
    INIT_CONTAINERS = "init-containers-uncaptured"
    AMBIENT_IGNORES = "ambient-ignores-annotation"


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """One thing worth saying: what it is about (an annotation, an argument, a rule), what is so, and what to do."""

    code: FindingCode
    severity: Severity
    subject: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        fix = f"; {self.fix}" if self.fix else ""
        return f"{self.subject}: {self.what}{fix}"

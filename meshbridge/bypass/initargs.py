"""istio-init's arguments and environment, read as its own flag library reads them.

``-b X``, ``-bX``, ``-b=X``, ``--long X`` and ``--long=X`` are the same; of a repeated flag the last wins; a flag beats
its environment variable; a missing list is none, not all.

Spec: istio tools/istio-iptables/pkg/cmd/root.go, pkg/flag; spf13/pflag.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from meshbridge.bypass.findings import Finding, FindingCode, Severity, shortened
from meshbridge.bypass.redirect_config import RedirectConfig

MAX_ARGUMENTS: Final = 256
MAX_VALUE: Final = 65536


@dataclass(frozen=True, slots=True)
class _Flag:
    """A flag of istio-iptables: its names, and the field it sets (empty: decides nothing about capture)."""

    long: str
    short: str = ""
    field: str = ""
    boolean: bool = False
    variables: tuple[str, ...] = ()
    by_name: bool = True

    @property
    def environment(self) -> tuple[str, ...]:
        """Variables that set it, later ones winning."""
        own = (self.long.upper().replace("-", "_"),) if self.by_name else ()
        return own + self.variables


_FLAGS: Final = (
    _Flag("envoy-port", "p", "proxy_port", by_name=False),
    _Flag("inbound-capture-port", "z", "inbound_port"),
    _Flag("inbound-tunnel-port", "e", "tunnel_port"),
    _Flag("proxy-uid", "u", "proxy_uid"),
    _Flag("proxy-gid", "g", "proxy_gid"),
    _Flag("istio-inbound-interception-mode", "m", "mode"),
    _Flag("istio-inbound-ports", "b", "include_inbound_ports"),
    _Flag("istio-local-exclude-ports", "d", "exclude_inbound_ports"),
    _Flag("istio-exclude-interfaces", "c", "exclude_interfaces"),
    _Flag("istio-service-cidr", "i", "include_outbound_ranges"),
    _Flag("istio-service-exclude-cidr", "x", "exclude_outbound_ranges"),
    _Flag("istio-outbound-ports", "q", "include_outbound_ports"),
    _Flag("istio-local-outbound-ports-exclude", "o", "exclude_outbound_ports"),
    _Flag("kube-virt-interfaces", "k", "reroute_interfaces"),
    _Flag("istio-inbound-tproxy-mark", "t", "tproxy_mark"),
    _Flag("istio-inbound-tproxy-route-table", "r"),
    _Flag("dry-run", "n", "dry_run", boolean=True),
    _Flag("iptables-probe-port"),
    _Flag("probe-timeout"),
    _Flag("skip-rule-apply", field="skip_rule_apply", boolean=True),
    _Flag("run-validation", boolean=True),
    _Flag("redirect-dns", field="redirect_dns", boolean=True, variables=("ISTIO_META_DNS_CAPTURE",)),
    _Flag("drop-invalid", field="drop_invalid", boolean=True, variables=("INVALID_DROP",)),
    _Flag("dual-stack", field="dual_stack", boolean=True, variables=("ISTIO_DUAL_STACK",)),
    _Flag("capture-all-dns", field="capture_all_dns", boolean=True),
    _Flag("network-namespace"),
    _Flag("cni-mode", boolean=True),
    _Flag("reconcile", boolean=True),
    _Flag("cleanup-only", field="cleanup_only", boolean=True),
    _Flag("force-apply", boolean=True),
    _Flag("native-nftables", field="native_nftables", boolean=True),
    _Flag("force-iptables-binary"),
    _Flag("log_as_json", boolean=True),
    _Flag("log_output_level"),
    _Flag("log_caller"),
    _Flag("log_rotate"),
    _Flag("log_rotate_max_age"),
    _Flag("log_rotate_max_backups"),
    _Flag("log_rotate_max_size"),
    _Flag("log_stacktrace_level"),
    _Flag("log_target"),
    _Flag("vklog"),
)
_BY_LONG = {flag.long: flag for flag in _FLAGS}
_BY_SHORT = {flag.short: flag for flag in _FLAGS if flag.short}
_VARIABLES_ONLY = {
    "ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR": "loopback",
    "ISTIO_OUTBOUND_OWNER_GROUPS": "owner_groups_include",
    "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE": "owner_groups_exclude",
}
TRUE: Final = frozenset({"1", "t", "T", "true", "TRUE", "True"})
FALSE: Final = frozenset({"0", "f", "F", "false", "FALSE", "False"})


def parse_bool(text: str) -> bool | None:
    """A boolean as Go's strconv.ParseBool reads it; None where it would not."""
    return True if text in TRUE else False if text in FALSE else None


def parse_init_args(arguments: Sequence[str], env: Mapping[str, str]) -> tuple[RedirectConfig, tuple[Finding, ...]]:
    """What istio-iptables takes from its arguments and environment, and what ends it.

    A NEVER_STARTS finding means that the program exits before it writes a rule; the config is what was read so far.
    """
    config = _from_environment(env)
    findings: list[Finding] = []
    words = list(arguments[:MAX_ARGUMENTS])
    if len(arguments) > MAX_ARGUMENTS or any(len(word) > MAX_VALUE for word in words):
        findings.append(
            _fatal(
                "istio-init arguments", f"more than {MAX_ARGUMENTS} arguments, or one of over {MAX_VALUE} characters"
            )
        )
        words = []
    while words:
        word = words.pop(0)
        if word == "--":
            break
        if not word.startswith("-") or word == "-":
            continue  # the command itself, or a word the program does not look at
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            config = _apply(config, _BY_LONG.get(name), f"--{name}", value if equals else None, words, findings)
        else:
            config = _short(config, word[1:], words, findings)
    return config, tuple(findings)


def _short(config: RedirectConfig, letters: str, words: list[str], findings: list[Finding]) -> RedirectConfig:
    """``-nb80`` is ``-n -b 80``: booleans may share a word, the first flag with a value takes the rest of it."""
    while letters:
        letter, letters = letters[0], letters[1:]
        flag = _BY_SHORT.get(letter)
        value: str | None = None
        if letters.startswith("="):
            value, letters = letters[1:], ""
        elif flag is not None and not flag.boolean and letters:
            value, letters = letters, ""
        config = _apply(config, flag, f"-{letter}", value, words, findings)
        if flag is None:
            break
    return config


def _apply(
    config: RedirectConfig,
    flag: _Flag | None,
    written: str,
    value: str | None,
    words: list[str],
    findings: list[Finding],
) -> RedirectConfig:
    if flag is None:
        findings.append(
            Finding(
                FindingCode.UNKNOWN_ARGUMENT,
                Severity.ERROR,
                f"istio-init argument {written}",
                "istio-iptables does not know it",
            )
        )
        findings.append(_fatal(f"istio-init argument {written}", "unknown flag"))
        words.clear()
        return config
    if value is None:
        if flag.boolean:
            value = "true"
        elif words:
            value = words.pop(0)
        else:
            findings.append(_fatal(f"istio-init argument {written}", "flag needs an argument"))
            return config
    if flag.boolean and parse_bool(value) is None:
        findings.append(_fatal(f"istio-init argument {written}", f"invalid boolean {value!r}"))
        words.clear()
        return config
    return _set(config, flag, value, f'istio-init argument {written} "{shortened(value)}"')


def _from_environment(env: Mapping[str, str]) -> RedirectConfig:
    """Variables first; a boolean that cannot be read is passed over, as the program does."""
    config = RedirectConfig()
    for flag in _FLAGS:
        for variable in flag.environment:
            value = env.get(variable)
            if value is None or len(value) > MAX_VALUE or (flag.boolean and parse_bool(value) is None):
                continue
            config = _set(config, flag, value, f'istio-init environment {variable}="{shortened(value)}"')
    for variable, field in _VARIABLES_ONLY.items():
        if variable in env:
            source = f'istio-init environment {variable}="{shortened(env[variable])}"'
            sources = {**config.sources, field: source}
            config = replace(config, **{field: env[variable], "sources": sources})  # type: ignore[arg-type]
    return config


def _set(config: RedirectConfig, flag: _Flag, value: str, source: str) -> RedirectConfig:
    if not flag.field:
        return config
    sources = {**config.sources, flag.field: source}
    typed: str | bool = value in TRUE if flag.boolean else value
    return replace(config, **{flag.field: typed, "sources": sources})  # type: ignore[arg-type]


def _fatal(subject: str, what: str) -> Finding:
    return Finding(
        FindingCode.NEVER_STARTS, Severity.ERROR, subject, f"{what}: istio-init fails and the pod never starts"
    )

"""What a pod's final specification leads to: the settings of its redirection, and what is worth saying of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from meshbridge.bypass import annotations as asked
from meshbridge.bypass.annotations import MeshDefaults
from meshbridge.bypass.findings import Finding, FindingCode, Severity, shortened
from meshbridge.bypass.initargs import parse_init_args
from meshbridge.bypass.redirect_config import RedirectConfig, RefusedError, istio_rules
from meshbridge.bypass.state import Truth
from meshbridge.bypass.values import value_findings
from meshbridge.identity.model import IpFamily, ProxyClass, Workload


@dataclass(frozen=True, slots=True)
class Expected:
    """What the pod's specification leads to."""

    truth: Truth
    config: RedirectConfig | None
    findings: tuple[Finding, ...] = ()
    starts: bool = True
    reason: str = ""


def expected_redirection(workload: Workload, mesh: MeshDefaults) -> Expected:
    """The settings that the specification leads to, and everything worth saying about them."""
    given = workload.annotations
    if workload.host_network:
        return Expected(Truth.NO_PROXY, None, reason="hostNetwork pods are never injected")
    if workload.init_args is not None:
        config, findings = parse_init_args(workload.init_args, workload.init_env)
        return _checked(workload, Truth.ARGUMENTS, config, [*findings, *contradictions(workload, config)])
    if workload.proxy_container is None and workload.proxy is ProxyClass.NONE:
        refused = asked.injection_refused(workload, mesh)
        if refused:
            return Expected(Truth.NO_PROXY, None, reason=refused)
        return _predicted(workload, mesh)
    if workload.proxy in (ProxyClass.GATEWAY, ProxyClass.WAYPOINT, ProxyClass.PROXYLESS):
        return Expected(Truth.NO_PROXY, None, reason=f"a {workload.proxy.value} workload has no redirection")
    if asked.STATUS in given and ("istio-validation" in workload.init_containers or mesh.cni):
        skipped = asked.cni_skips(workload)
        if skipped:
            return Expected(Truth.ANNOTATIONS, None, (_no_redirection(workload, skipped),), reason=skipped)
        if findings := asked.check_cni(given):
            return Expected(Truth.ANNOTATIONS, None, findings, starts=False, reason="the CNI plugin fails")
        return _checked(workload, Truth.ANNOTATIONS, asked.cni_config(given, workload.proxy_container), [])
    if asked.STATUS in given:
        reason = "the pod has a sidecar but neither istio-init nor istio-validation"
        if given.get(asked.INTERCEPTION_MODE) == "NONE":
            reason = f'annotation {asked.INTERCEPTION_MODE} is "NONE"'
        return Expected(Truth.ARGUMENTS, None, (_no_redirection(workload, reason),), reason=reason)
    return _predicted(workload, mesh)


def _predicted(workload: Workload, mesh: MeshDefaults) -> Expected:
    """A pod as a person wrote it: what the injector will make of it."""
    given = workload.annotations
    if refused := asked.check_injector(given):
        return Expected(Truth.PREDICTED, None, refused, starts=False, reason="the injector refuses the pod")
    if mesh.cni:
        final = asked.render_cni_annotations(given, mesh)
        if failing := asked.check_cni(final):
            return Expected(Truth.PREDICTED, None, failing, starts=False, reason="the CNI plugin fails")
        return _checked(workload, Truth.PREDICTED, asked.cni_config(final, workload.proxy_container), [])
    arguments = asked.render_init_args(given, mesh)
    if not arguments:
        reason = f'annotation {asked.INTERCEPTION_MODE} is "NONE"'
        return Expected(Truth.PREDICTED, None, (_no_redirection(workload, reason),), reason=reason)
    env = {"ISTIO_META_DNS_CAPTURE": str(mesh.dns_capture).lower(), "ISTIO_DUAL_STACK": str(mesh.dual_stack).lower()}
    config, findings = parse_init_args(arguments, env)
    sources = dict(config.sources)
    for annotation, name in asked.FIELD_OF_ANNOTATION.items():
        if annotation in given:
            sources[name] = f'annotation {annotation}: "{shortened(given[annotation])}"'
    return _checked(workload, Truth.PREDICTED, replace(config, sources=sources), list(findings))


def _checked(workload: Workload, truth: Truth, config: RedirectConfig, findings: list[Finding]) -> Expected:
    """Add what the values themselves give away, and whether iptables takes them."""
    findings += value_findings(workload, config, cni=truth is Truth.ANNOTATIONS)
    if any(finding.code is FindingCode.NEVER_STARTS for finding in findings):
        return Expected(truth, None, tuple(findings), starts=False, reason="istio-init fails")
    try:
        for family in families_with_rules(workload, config):
            istio_rules(config, family)
    except RefusedError as error:
        subject = config.source(error.field) or error.field
        what = f"{shortened(error.value)!r}: {error.reason}: setting up redirection fails and the pod never starts"
        findings.append(Finding(FindingCode.NEVER_STARTS, Severity.ERROR, subject, what))
        return Expected(truth, None, tuple(findings), starts=False, reason=str(error))
    return Expected(truth, config, tuple(findings))


def _no_redirection(workload: Workload, reason: str) -> Finding:
    return Finding(
        FindingCode.NO_REDIRECTION,
        Severity.WARNING,
        f"pod {workload.key}",
        f"has a sidecar, but nothing is redirected to it: {reason}",
    )


def contradictions(workload: Workload, config: RedirectConfig) -> list[Finding]:
    """Annotations that istio-init's arguments do not carry out, and exclusions that no annotation asked for."""
    found = []
    given = workload.annotations
    for annotation, name in asked.FIELD_OF_ANNOTATION.items():
        actual = getattr(config, name)
        if annotation in given and not (annotation == asked.KUBEVIRT_INTERFACES and asked.REROUTE_INTERFACES in given):
            wanted = given[annotation]
            missing, extra = (
                _items(wanted) - _items(actual),
                _items(actual) - _items(wanted) - _added(annotation, given),
            )
            if missing or extra:
                actual_source = config.source(name) or f"istio-init was given no value for {name}"
                what = f'says "{shortened(wanted)}", but {actual_source}: followed istio-init'
                fix = "restart the pod if the annotation was edited after it started"
                found.append(
                    Finding(FindingCode.ARGUMENTS_CONTRADICT, Severity.WARNING, f"annotation {annotation}", what, fix)
                )
        elif name.startswith("exclude") and (extra := _items(actual) - _added(annotation, given)):
            listed = shortened(",".join(sorted(extra)))
            what = f"excludes {listed} although no annotation of the pod asks for it (mesh-wide global.proxy values?)"
            found.append(Finding(FindingCode.MESH_WIDE, Severity.INFO, config.source(name), what))
    return found


def _added(annotation: str, given: Mapping[str, str]) -> set[str]:
    """What the injector adds by itself."""
    if annotation != asked.EXCLUDE_INBOUND_PORTS:
        return set()
    return {*asked.ISTIO_PORTS, given.get(asked.STATUS_PORT, "15020").strip()}


def _items(text: str) -> set[str]:
    return {item.strip() for item in text.split(",") if item.strip()}


def families_with_rules(workload: Workload, config: RedirectConfig) -> frozenset[IpFamily]:
    """IPv4 rules are always written; IPv6 ones only if the pod has no IPv4 address, or dual stack is on."""
    versions = [IpFamily.of(address) for address in workload.addresses]
    second = bool(versions) and (IpFamily.IPV4 not in versions or (config.dual_stack and IpFamily.IPV6 in versions))
    return frozenset(IpFamily) if second else frozenset({IpFamily.IPV4})


def family_findings(workload: Workload, config: RedirectConfig, families: frozenset[IpFamily]) -> list[Finding]:
    has_v6 = any(address.version == 6 for address in workload.addresses)
    if not has_v6 or IpFamily.IPV6 in families:
        return []
    what = "has IPv4 and IPv6 addresses, and only IPv4 is redirected: everything over IPv6 bypasses Envoy"
    return [Finding(FindingCode.IPV6_BYPASSES, Severity.WARNING, f"pod {workload.key}", what, "set ISTIO_DUAL_STACK")]

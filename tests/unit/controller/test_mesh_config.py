"""MeshConfig as the ConfigMap ``istio`` has it: what is read of it, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshbridge.controller.meshconfig import MeshConfigError, read_mesh_config
from meshbridge.policy.mesh import DEFAULT_MESH, MeshSettings, PathNormalization, ProviderKind
from meshbridge.policy.model import Document

EMPTY = replace(DEFAULT_MESH, providers=())


def settings(text: str) -> MeshSettings:
    return read_mesh_config(Document("ConfigMap", "v1", "istio-system", "istio", {"data": {"mesh": text}}))


def provider(name: str, body: str) -> str:
    return f"extensionProviders: [{{name: {name}, {body}}}]"


def test_who_configures_the_sidecars_stands_on_the_config_map() -> None:
    def read(value: str) -> MeshSettings:
        metadata = {"name": "istio", "annotations": {"meshbridge.io/sidecars": value}}
        return read_mesh_config(Document("ConfigMap", "v1", "istio-system", "istio", {"metadata": metadata}))

    assert read("meshbridge") == replace(EMPTY, own_sidecars=True)
    assert read("istio") == EMPTY
    with pytest.raises(MeshConfigError, match=r"meshbridge\.io/sidecars 'mine' is not known"):
        read("mine")


READ: dict[str, tuple[str, MeshSettings]] = {
    "nothing said is Istio's defaults": ("", EMPTY),
    "names": (
        "{rootNamespace: mesh, trustDomain: td1, trustDomainAliases: [old, older]}",
        replace(EMPTY, root_namespace="mesh", trust_domain="td1", trust_domain_aliases=("old", "older"))),
    "paths as they come": (
        "pathNormalization: {normalization: NONE}", replace(EMPTY, path_normalization=PathNormalization.NONE)),
    "paths by default": ("pathNormalization: {normalization: DEFAULT}", EMPTY),
    "slashes merged": (
        "pathNormalization: {normalization: DECODE_AND_MERGE_SLASHES}",
        replace(EMPTY, path_normalization=PathNormalization.DECODE_AND_MERGE_SLASHES)),
    "only what the registry knows": (
        "outboundTrafficPolicy: {mode: REGISTRY_ONLY}", replace(EMPTY, registry_only=True)),
    "anything": ("outboundTrafficPolicy: {mode: ALLOW_ANY}", EMPTY),
    "no mTLS by itself": ("enableAutoMtls: false", replace(EMPTY, auto_mtls=False)),
    "proxies before the gateways": (
        "defaultConfig: {gatewayTopology: {numTrustedProxies: 2}}", replace(EMPTY, trusted_proxies=2)),
    "another way to capture": (
        "defaultConfig: {interceptionMode: TPROXY}", replace(EMPTY, interception="TPROXY")),
    "a gRPC provider": (
        provider("opa", "envoyExtAuthzGrpc: {service: opa.ns.svc, port: 9191}"),
        replace(EMPTY, providers=(("opa", ProviderKind.GRPC),))),
    "an HTTP provider": (
        provider("oauth", 'envoyExtAuthzHttp: {service: oauth.ns.svc, port: "4180"}'),
        replace(EMPTY, providers=(("oauth", ProviderKind.HTTP),))),
    "a provider of traces is none for policies": (provider("z", "zipkin: {service: z, port: 9411}"), EMPTY),
    "a provider without a port": (
        provider("opa", "envoyExtAuthzGrpc: {service: opa}"),
        replace(EMPTY, providers=(("opa", ProviderKind.UNUSABLE),))),
    "a provider whose name is none": (
        provider("Opa", "envoyExtAuthzGrpc: {service: opa, port: 1}"),
        replace(EMPTY, providers=(("Opa", ProviderKind.UNUSABLE),))),
    "two providers of one name": (
        "extensionProviders: [{name: a, envoyExtAuthzGrpc: {service: s, port: 1}},"
        " {name: a, envoyExtAuthzHttp: {service: s, port: 1}}]",
        replace(EMPTY, providers=(("a", ProviderKind.UNUSABLE),))),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), READ.values(), ids=READ.keys())
def test_what_is_read(text: str, expected: MeshSettings) -> None:
    assert settings(text) == expected


REFUSED = {
    "a list": ("[]", "is no mapping"),
    "aliases that are none": ("trustDomainAliases: x", "trustDomainAliases is no list"),
    "a trust domain that is none": ("trustDomain: 'a/b'", "trustDomain 'a/b' is no name"),
    "an unknown normalization": ("pathNormalization: {normalization: ALL}", "pathNormalization.normalization 'ALL'"),
    "a normalization beside its mapping": ("pathNormalization: BASE", "pathNormalization is no mapping"),
    "an unknown mode": ("outboundTrafficPolicy: {mode: SOME}", "use one of: ALLOW_ANY, REGISTRY_ONLY"),
    "a truth in quotes": ('enableAutoMtls: "false"', "neither true nor false"),
    "proxies that are no number": (
        "defaultConfig: {gatewayTopology: {numTrustedProxies: many}}",
        "defaultConfig.gatewayTopology.numTrustedProxies 'many' is no count"),
    "providers that are no list": ("extensionProviders: {}", "extensionProviders is no list"),
    "a provider that is none": ("extensionProviders: [a]", "element that is no mapping"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "sentence"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(MeshConfigError) as error:
        settings(text)
    assert sentence in str(error.value)

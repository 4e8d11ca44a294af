"""The injector's ConfigMap as mesh-wide defaults; what it does not say, or not in its form, is Istio's."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from meshbridge.bypass.annotations import MeshDefaults
from meshbridge.policy.mesh import DEFAULT_MESH
from meshbridge.webhook.injector import mesh_defaults

VALUES = {
    "nothing": ({}, MeshDefaults()),
    "ports and ranges": (
        {"global": {"proxy": {"excludeInboundPorts": "9100", "includeIPRanges": "10.0.0.0/8", "statusPort": 15020}}},
        MeshDefaults(exclude_inbound_ports="9100", include_ip_ranges="10.0.0.0/8"),
    ),
    "CNI": ({"pilot": {"cni": {"enabled": True}}}, MeshDefaults(cni=True)),
    "CNI before 1.23": ({"istio_cni": {"enabled": True}}, MeshDefaults(cni=True)),
    "other types": ({"global": {"proxy": {"excludeInboundPorts": ["1"]}}, "pilot": []}, MeshDefaults()),
    "no mapping": ([], MeshDefaults()),
}


@pytest.mark.parametrize(("values", "expected"), VALUES.values(), ids=VALUES.keys())
def test_values(values: Any, expected: MeshDefaults) -> None:
    assert mesh_defaults({"data": {"values": json.dumps(values)}}, DEFAULT_MESH) == expected


@pytest.mark.parametrize("config_map", [{}, {"data": None}, {"data": {"values": "{"}}, {"data": {"values": 1}}])
def test_what_cannot_be_read_is_istios_default(config_map: dict[str, Any]) -> None:
    assert mesh_defaults(config_map, DEFAULT_MESH) == MeshDefaults()


def test_the_meshs_own_interception_mode_counts() -> None:
    assert mesh_defaults({}, replace(DEFAULT_MESH, interception="TPROXY")).interception_mode == "TPROXY"

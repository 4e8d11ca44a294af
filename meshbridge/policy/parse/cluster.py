"""Cluster objects that are no workloads, as far as policies and the controller ask for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from meshbridge.identity.model import IpAddress


@dataclass(frozen=True, slots=True)
class Namespace:
    name: str
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Node:
    name: str
    addresses: tuple[IpAddress, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class ServicePort:
    """``target`` is a number or a container port's name; ``app_protocol`` decides whether Envoy speaks HTTP on it."""

    name: str
    port: int
    target: int | str
    protocol: str = "TCP"
    app_protocol: str = ""


@dataclass(frozen=True, slots=True)
class Service:
    """``selector`` None: its endpoints are somebody else's business."""

    namespace: str
    name: str
    addresses: tuple[IpAddress, ...] = ()
    ports: tuple[ServicePort, ...] = ()
    selector: Mapping[str, str] | None = field(default=None, hash=False)


@dataclass(frozen=True, slots=True)
class ServiceAccount:
    namespace: str
    name: str

"""Changing the redirect rules in a running pod's namespace by hand, as nobody should."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from meshbridge.demo.layout import NETNS
from meshbridge.demo.records import PodRecord


@contextmanager
def extra_rule(record: PodRecord, *rule: str) -> Iterator[None]:
    """``rule`` stands first in its chain of the nat table, for both families, until the block ends."""
    tools = [
        ["nsenter", f"--net={NETNS / record.netns}", tool, "-w", "-t", "nat"] for tool in ("iptables", "ip6tables")
    ]
    for tool in tools:
        subprocess.run([*tool, "-I", *rule], check=True, capture_output=True)
    try:
        yield
    finally:
        for tool in tools:
            subprocess.run([*tool, "-D", *rule], check=True, capture_output=True)

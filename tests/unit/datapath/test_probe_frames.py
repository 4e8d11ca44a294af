"""The frames of probes: right in everything but the checksum, so that no stack takes them for a connection."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import pytest

from meshbridge.datapath.probes import ProbeFlow, frame

FLOWS = {
    "IPv4": ProbeFlow(ip_address("10.0.0.9"), 61001, ip_address("10.0.0.1"), 9090),
    "IPv6": ProbeFlow(ip_address("fd00::9"), 65535, ip_address("fd00::1"), 80),
}


def folded(data: bytes) -> int:
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(total)


@pytest.mark.parametrize("flow", FLOWS.values(), ids=FLOWS.keys())
def test_all_is_right_but_the_tcp_checksum(flow: ProbeFlow) -> None:
    for _ in range(200):
        data = frame(flow, b"mark", source_mac=b"\x02" + bytes(5), destination_mac=b"\x06" + bytes(5))
        assert (data[:6], data[6:12]) == (b"\x06" + bytes(5), b"\x02" + bytes(5))
        ip, at = data[14:], 20 if flow.source.version == 4 else 40
        assert len(ip) == at + 20 + 16
        if flow.source.version == 4:
            assert data[12:14] == b"\x08\x00"
            assert folded(ip[:20]) == 0xFFFF, "the header's own checksum"
            assert struct.unpack(">H", ip[2:4])[0] == len(ip)
            addresses = ip[12:20]
        else:
            assert data[12:14] == b"\x86\xdd"
            assert struct.unpack(">H", ip[4:6])[0] == len(ip) - at
            addresses = ip[8:40]
        assert addresses == flow.source.packed + flow.destination.packed
        tcp = ip[at:]
        assert struct.unpack(">HH", tcp[:4]) == (flow.source_port, flow.destination_port)
        assert tcp[12:14] == b"\x50\x02", "a SYN without options"
        assert tcp[20:24] == b"mark"
        assert folded(addresses + struct.pack(">II", len(tcp), 6) + tcp) != 0xFFFF
    assert frame(flow, b"mark", source_mac=bytes(6), destination_mac=bytes(6)) != data, "no two are alike"

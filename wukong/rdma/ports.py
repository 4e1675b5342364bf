"""RDMA devices of this machine, as sysfs shows them: no library is needed to look."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

DEVICES = Path("/sys/class/infiniband")
CHANNEL_ADAPTER = "1:"
"""Node type of InfiniBand and RoCE."""
IWARP = "4:"
"""Node type of iWARP. Its queue pairs become ready only through the RDMA connection manager (the
kernel refuses it from anybody else), of which no bindings give calls that end with a time."""

UNUSED_GIDS = 32
"""Places of the table of addresses that are read after the last one in use. A table may have 1,024,
and the kernel puts an address into the first that is free (`ib_cache_gid_add`)."""


@dataclass(frozen=True, slots=True)
class Port:
    """A port of a device that is up, and the address under which others reach it."""

    device: str
    """As in `rdma link`."""
    number: int
    """From 1."""
    gid_index: int
    """Of the global address to use: RoCE v2 over IPv4 if there is one."""
    gid: bytes
    """16 bytes; an IPv4 address ends them on RoCE."""
    lid: int
    """Local address; 0 on RoCE."""


def find_ports(devices: Path = DEVICES) -> list[Port]:
    """Ports that are up, of devices that speak InfiniBand or RoCE, by name.

    Cost: some files of sysfs for each device.
    """
    found = []
    for device in sorted(devices.iterdir()) if devices.is_dir() else []:
        try:
            if not _text(device / "node_type").startswith(CHANNEL_ADAPTER):
                continue
            for folder in sorted((device / "ports").iterdir()):
                # A device between two states lists a port, and then has it no more.
                if _text(folder / "state").startswith("4:") and (gid := _best_gid(folder)):
                    lid = int(_text(folder / "lid"), 16)
                    found.append(Port(device.name, int(folder.name), *gid, lid))
        except OSError:
            continue
    return found


def find_iwarp(devices: Path = DEVICES) -> list[str]:
    """Names of devices that speak iWARP, and are not used."""
    found = []
    for device in sorted(devices.iterdir()) if devices.is_dir() else []:
        with contextlib.suppress(OSError):
            if _text(device / "node_type").startswith(IWARP):
                found.append(device.name)
    return found


def _best_gid(port: Path) -> tuple[int, bytes] | None:
    """Index and bytes of the best global address: RoCE v2 over IPv4, RoCE v2, any."""
    best = None
    index = n_unused = 0
    while n_unused < UNUSED_GIDS:
        try:
            gid = bytes.fromhex(_text(port / "gids" / str(index)).replace(":", ""))
            kind = _text(port / "gid_attrs" / "types" / str(index)) if any(gid) else ""
        except OSError:
            gid, kind = b"", ""
        if any(gid):
            is_ipv4 = gid.startswith(bytes(10) + b"\xff\xff")
            rank = (kind == "RoCE v2", is_ipv4, -index)
            if best is None or rank > best[0]:
                best = (rank, index, gid)
        n_unused = 0 if any(gid) else n_unused + 1
        index += 1
    return best and best[1:]


def _text(path: Path) -> str:
    # Half of the calls of the system that a Python file takes: there are many, at each heartbeat.
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 4096).decode("ascii").strip()
    finally:
        os.close(fd)

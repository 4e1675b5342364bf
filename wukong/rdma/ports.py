"""RDMA devices of this machine, as sysfs shows them: no library is needed to look."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DEVICES = Path("/sys/class/infiniband")
CHANNEL_ADAPTER = "1:"
"""Node type of InfiniBand and RoCE. iWARP's, 4, cannot write with an immediate value."""


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


def _best_gid(port: Path) -> tuple[int, bytes] | None:
    """Index and bytes of the best global address: RoCE v2 over IPv4, RoCE v2, any."""
    best = None
    for path in (port / "gids").iterdir():
        try:
            kind = _text(port / "gid_attrs" / "types" / path.name)
            gid = bytes.fromhex(_text(path).replace(":", ""))
        except OSError:
            continue  # an entry of the table that is not in use
        if not any(gid):
            continue
        is_ipv4 = gid.startswith(bytes(10) + b"\xff\xff")
        rank = (kind == "RoCE v2", is_ipv4, -int(path.name))
        if best is None or rank > best[0]:
            best = (rank, int(path.name), gid)
    return best and best[1:]


def _text(path: Path) -> str:
    return path.read_text(encoding="ascii").strip()

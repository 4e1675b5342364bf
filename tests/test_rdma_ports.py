"""RDMA devices as sysfs shows them, and what is said where something is missing."""

import subprocess
import sys
from pathlib import Path

import pytest

from wukong.errors import FrameError, LeaseRefused
from wukong.rdma import transport_verbs, verbs
from wukong.rdma.ports import Port, find_iwarp, find_ports
from wukong.rdma.queue_pairs import read_offer

LINK_LOCAL = "fe80:0000:0000:0000:801f:f1ff:fe40:c724"
IPV4 = "0000:0000:0000:0000:0000:ffff:c612:0001"
UNUSED = "0000:0000:0000:0000:0000:0000:0000:0000"
Gids = dict[int, tuple[str, str | None]]
ROCE: Gids = {
    0: (LINK_LOCAL, "RoCE v2"),
    1: (IPV4, "IB/RoCE v1"),
    2: (IPV4, "RoCE v2"),
    3: (UNUSED, None),
}


def make_device(
    folder: Path, name: str, gids: Gids, node_type: str = "1: CA", state: str = "4: ACTIVE"
) -> None:
    port = folder / name / "ports" / "1"
    (port / "gids").mkdir(parents=True)
    (port / "gid_attrs" / "types").mkdir(parents=True)
    (folder / name / "node_type").write_text(node_type + "\n")
    (port / "state").write_text(state + "\n")
    (port / "lid").write_text("0x1a\n")
    for index, (gid, kind) in gids.items():
        (port / "gids" / str(index)).write_text(gid + "\n")
        if kind is not None:
            (port / "gid_attrs" / "types" / str(index)).write_text(kind + "\n")


def test_a_port_is_reached_by_roce_v2_over_ipv4(tmp_path: Path) -> None:
    make_device(tmp_path, "rxe0", ROCE)
    gid = bytes(10) + b"\xff\xff" + bytes([198, 18, 0, 1])
    assert find_ports(tmp_path) == [Port("rxe0", 1, 2, gid, 0x1A)]


def test_infiniband_has_the_first_address_of_its_table(tmp_path: Path) -> None:
    make_device(tmp_path, "ib0", {0: (LINK_LOCAL, "IB/RoCE v1"), 1: (LINK_LOCAL, "IB/RoCE v1")})
    (port,) = find_ports(tmp_path)
    assert (port.gid_index, port.lid) == (0, 0x1A)


def test_ports_that_cannot_be_used_are_left_out(tmp_path: Path) -> None:
    make_device(tmp_path, "down0", ROCE, state="1: DOWN")
    make_device(tmp_path, "iwarp0", ROCE, node_type="4: RNIC")
    make_device(tmp_path, "empty0", {0: (UNUSED, None)})
    (tmp_path / "going0").mkdir()
    assert find_ports(tmp_path) == []
    assert find_ports(tmp_path / "absent") == []


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_verbs, "DEVICES", tmp_path / "absent")
    assert "no RDMA device (" in transport_verbs.missing()
    make_device(tmp_path, "rxe0", ROCE)
    monkeypatch.setattr(transport_verbs, "DEVICES", tmp_path)
    monkeypatch.setattr(transport_verbs, "find_ports", lambda: find_ports(tmp_path / "absent"))
    assert "has a port that is up" in transport_verbs.missing()
    monkeypatch.setattr(transport_verbs, "find_ports", lambda: find_ports(tmp_path))
    monkeypatch.setattr(transport_verbs, "find_bindings", list)
    assert "pip install 'wukong[rdma]'" in transport_verbs.missing()


def test_a_device_that_speaks_iwarp_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_device(tmp_path, "siw0", {0: (IPV4, "IB/RoCE v1")}, node_type="4: RNIC")
    monkeypatch.setattr(transport_verbs, "DEVICES", tmp_path)
    for name, function in (("find_ports", find_ports), ("find_iwarp", find_iwarp)):
        monkeypatch.setattr(transport_verbs, name, lambda function=function: function(tmp_path))
    assert "siw0: iWARP" in transport_verbs.missing()
    make_device(tmp_path, "rxe0", ROCE)
    assert "iWARP" not in transport_verbs.missing()


@pytest.mark.parametrize("bindings", [None, "ibverbs", "pyverbs"])
def test_a_queue_pair_without_bindings_or_device_is_refused(bindings: str | None) -> None:
    port = Port("absent0", 1, 0, bytes(16), 0)
    with pytest.raises(LeaseRefused):
        verbs.open_pair(port, 16, bindings)


@pytest.mark.slow
def test_importing_wukong_imports_no_bindings_and_needs_none() -> None:
    program = (
        "import sys\n"
        "sys.modules['ibverbs'] = sys.modules['pyverbs'] = None\n"
        "import logging, wukong, wukong.rdma.transport_verbs, wukong.rdma.verbs as verbs\n"
        "assert verbs.find_bindings() == []\n"
        "assert wukong.rdma.transport_verbs.missing()\n"
        "assert not logging.getLogger().handlers\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
def test_the_name_lease_is_the_function_whatever_was_imported_before() -> None:
    program = (
        "import wukong.rdma.lease\n"
        "from wukong.rdma.lease import Request\n"
        "import wukong.rdma.agent, wukong.rdma\n"
        "assert callable(wukong.rdma.lease)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
def test_looking_for_bindings_leaves_the_root_logger_alone() -> None:
    program = (
        "import logging, wukong.rdma.verbs as verbs\n"
        "verbs.find_bindings()\n"
        "root = logging.getLogger()\n"
        "assert not root.handlers and root.level == logging.WARNING\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


OFFER = {
    "number": 17,
    "packet": 5,
    "gid": "00" * 10 + "ffffc6120001",
    "lid": 0,
    "mtu": 3,
    "address": 1 << 40,
    "key": 99,
    "arena_bytes": 4096,
}


def test_an_offer_is_read() -> None:
    address, arena_bytes, at, key = read_offer(OFFER)
    assert (address.number, address.gid[-4:], arena_bytes) == (17, bytes([198, 18, 0, 1]), 4096)
    assert (at, key) == (1 << 40, 99)


@pytest.mark.parametrize(
    "lie",
    [
        {"number": 1 << 24},
        {"number": True},
        {"packet": -1},
        {"gid": "00"},
        {"gid": "zz" * 16},
        {"gid": 5},
        {"lid": 1 << 16},
        {"mtu": 0},
        {"mtu": 6},
        {"address": 1 << 64},
        {"address": 1.5},
        {"key": "99"},
        {"arena_bytes": 0},
        {"arena_bytes": 1 << 48},
    ],
    ids=repr,
)
def test_an_offer_that_lies_is_refused(lie: dict[str, object]) -> None:
    with pytest.raises(FrameError):
        read_offer({**OFFER, **lie})  # type: ignore[dict-item]
    missing = dict(OFFER)
    del missing[next(iter(lie))]
    with pytest.raises(FrameError):
        read_offer(missing)

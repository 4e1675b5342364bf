"""RDMA devices, and queue pairs that write into each other's memory. Alone imports bindings.

Two bindings are known. `ibverbs` (the wheel of that name) finds libibverbs when it is imported, and
lets other threads run during its calls. `pyverbs` is rdma-core's own; Debian's python3-pyverbs is
found from a virtual environment too.

Errors of the libraries become `LeaseRefused` while a queue pair is made, and `LeaseLost` after it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import importlib.machinery
import importlib.util
import logging
import mmap
import os
import socket
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from wukong.errors import LeaseLost, LeaseRefused
from wukong.rdma.ports import Port
from wukong.rdma.queue_pairs import (
    ACK_TIMEOUT,
    N_RETRIES,
    N_RNR_RETRIES,
    RNR_TIMER,
    SEND_DEPTH,
    Address,
    QueuePair,
    Region,
)

if TYPE_CHECKING:
    import ibverbs

NO_BINDINGS = "no bindings: pip install 'wukong[rdma]'; Debian: apt install ibverbs-providers"
DEBIAN_PACKAGES = "/usr/lib/python3/dist-packages"

T = TypeVar("T")

_loading = threading.Lock()
"""While bindings are imported, and while it is found out which descriptors pyverbs has opened."""

# ---------------------------------------------------------------- bindings


def find_bindings() -> list[str]:
    """Names of the bindings that can be imported here, the preferred one first.

    Cost: imports them, at the first call.
    """
    return [name for name in ("ibverbs", "pyverbs") if _load(name) is not None]


def open_pair(port: Port, n_receives: int, bindings: str | None = None) -> QueuePair:
    """Make a queue pair on a port.

    Args:
        n_receives: how many may be allowed by `receive` at a time.
        bindings: one of `find_bindings()`; None: the first.
    Raises:
        LeaseRefused: there are no bindings, or the device does not give what is asked for.
    """
    names = [bindings] if bindings else find_bindings()
    if not names or _load(names[0]) is None:
        raise LeaseRefused(f"verbs cannot be used: {NO_BINDINGS}")
    make = _IbverbsPair if names[0] == "ibverbs" else _PyverbsPair
    return make(port, n_receives)


def _load(name: str) -> ModuleType | None:
    """Import bindings; None: they are not here, or find no libibverbs of their version."""
    with _loading:
        if name in sys.modules:
            return sys.modules[name]
        # Importing pyverbs configures the root logger, which is the program's to configure.
        root = logging.getLogger()
        handlers, level = root.handlers[:], root.level
        try:
            if name == "ibverbs":
                import ibverbs  # noqa: F401 - found in sys.modules
            else:
                _load_pyverbs()
            return sys.modules[name]
        except ImportError:
            sys.modules.pop(name, None)
            return None
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)


def _load_pyverbs() -> None:
    if importlib.util.find_spec("pyverbs") is None:
        # Of all that Debian has installed for its own Python, only this becomes visible.
        spec = importlib.machinery.PathFinder.find_spec("pyverbs", [DEBIAN_PACKAGES])
        if spec is None or spec.loader is None:
            raise ImportError("no pyverbs")
        module = importlib.util.module_from_spec(spec)
        sys.modules["pyverbs"] = module
        spec.loader.exec_module(module)
    import pyverbs.qp  # noqa: F401 - an extension module: it fits this Python, or it does not


def _address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _first_packet() -> int:
    # Random, so that packets of an earlier connection with the same number are not taken for ours.
    return int.from_bytes(os.urandom(3), "little")


# ---------------------------------------------------------------- the wheel `ibverbs`


class _IbverbsPair:
    """A queue pair by `ibverbs`."""

    waits_freely = True

    def __init__(self, port: Port, n_receives: int) -> None:
        import ibverbs

        self._ib = ibverbs
        self._port = port
        self._regions: list[ibverbs.MR] = []
        self._failure = ""
        self._n_completed = 0
        try:
            device = next(d for d in ibverbs.get_device_list() if d.name == port.device)
            self._context = device.open()
            self._domain = self._context.alloc_pd()
            self._channel = self._context.create_comp_channel()
            self._sent = self._context.create_cq(SEND_DEPTH)
            self._arrived = self._context.create_cq(n_receives, self._channel)
            self._pair = self._domain.create_qp(
                ibverbs.QPInitAttr(
                    send_cq=self._sent,
                    recv_cq=self._arrived,
                    qp_type=ibverbs.QPType.RC,
                    max_send_wr=SEND_DEPTH,
                    max_recv_wr=n_receives,
                )
            )
            mtu = int(self._context.query_port(port.number).active_mtu)
            self._pair.to_init(port.number, int(ibverbs.AccessFlags.REMOTE_WRITE))
        except (ibverbs.VerbsError, StopIteration) as error:
            raise LeaseRefused(f"{port.device} gives no queue pair: {error!r}") from error
        self.address = Address(self._pair.qp_num, _first_packet(), port.gid, port.lid, mtu)
        self.event_fd: int = self._channel.fd
        self.async_fd: int = self._context.async_fd
        # Requests are made once: the fields are read when they are posted.
        self._receives = [ibverbs.RecvWR()] * n_receives
        self._request = ibverbs.SendWR(sg_list=[])
        self._plain = int(ibverbs.WROpcode.RDMA_WRITE)
        self._telling = int(ibverbs.WROpcode.RDMA_WRITE_WITH_IMM)
        self._signaled = int(ibverbs.SendFlags.SIGNALED)

    def register(self, memory: mmap.mmap, is_remote_writable: bool) -> Region:
        flags = self._ib.AccessFlags.LOCAL_WRITE
        if is_remote_writable:
            flags |= self._ib.AccessFlags.REMOTE_WRITE
        address = _address_of(memory)
        try:
            region = self._domain.reg_mr(address, len(memory), int(flags))
        except self._ib.VerbsError as error:
            raise LeaseRefused(_no_region(len(memory), error)) from error
        self._regions.append(region)
        return Region(address, len(memory), region.lkey, region.rkey)

    def connect(self, peer: Address) -> None:
        info = self._ib.QPInfo(
            peer.number, peer.packet, peer.lid, peer.gid, self._port.number, peer.mtu
        )
        try:
            self._pair.to_rtr(
                info,
                sgid_index=self._port.gid_index,
                mtu=min(peer.mtu, self.address.mtu),
                hop_limit=64,
                min_rnr_timer=RNR_TIMER,
            )
            self._pair.to_rts(
                self.address.packet,
                timeout=ACK_TIMEOUT,
                retry_cnt=N_RETRIES,
                rnr_retry=N_RNR_RETRIES,
            )
        except self._ib.VerbsError as error:
            raise LeaseLost(f"no way from {self._port.device} to the peer: {error!r}") from error

    def write(
        self,
        source: Region,
        offset: int,
        size_bytes: int,
        address: int,
        remote_key: int,
        immediate: int | None,
        count: int | None,
    ) -> None:
        request = self._request
        request.sg_list = [self._ib.SGE(source.address + offset, size_bytes, source.local_key)]
        request.remote_addr = address
        request.rkey = remote_key
        if immediate is None:
            request.opcode = self._plain
        else:
            request.opcode = self._telling
            # The wheel hands it on as it is; others expect the network's order.
            request.imm_data = socket.htonl(immediate)
        if count is None:
            request.send_flags = 0
        else:
            request.send_flags = self._signaled
            request.wr_id = count
        try:
            self._pair.post_send([request])
        except self._ib.VerbsError as error:
            raise LeaseLost(f"the queue pair takes no more writes: {error!r}") from error

    def n_completed(self) -> int:
        for completion in self._sent.poll(SEND_DEPTH):
            if not completion.is_success:
                self._failure = self._failure or completion.status_str
                raise LeaseLost(self.failure())
            self._n_completed = completion.wr_id
        return self._n_completed

    def receive(self, n: int) -> None:
        try:
            self._pair.post_recv(self._receives[:n])
        except self._ib.VerbsError as error:
            raise LeaseLost(f"the queue pair takes no more receives: {error!r}") from error

    def arrivals(self) -> list[int]:
        completions = self._arrived.poll(16)
        if not completions and not self._failure:
            return []
        came = []
        for completion in completions:
            if not completion.is_success:
                self._failure = self._failure or completion.status_str
                break
            came.append(socket.ntohl(completion.imm_data))
        if not came:
            raise LeaseLost(self.failure())
        return came

    def arm(self) -> None:
        self._arrived.req_notify()

    def take_event(self) -> None:
        try:
            self._channel.get_cq_event()
            self._arrived.ack_events(1)
        except self._ib.VerbsError as error:
            if error.errno != errno.EINTR:  # after that the signal's handler runs
                raise LeaseLost(f"no events of {self._port.device}: {error!r}") from error

    def failure(self) -> str:
        for completion in self._sent.poll(SEND_DEPTH):
            # The first one that failed says why; the others were flushed since then.
            if not completion.is_success:
                flushed = self._ib.WCStatus.WR_FLUSH_ERR
                if not self._failure or int(completion.status) != int(flushed):
                    self._failure = completion.status_str
                    break
        return f"the connection on {self._port.device} has failed: {self._failure or 'cut'}"

    def stop(self) -> None:
        with contextlib.suppress(self._ib.VerbsError):
            state = int(self._ib.QPState.ERR)
            self._pair.modify(int(self._ib.QPAttrMask.STATE), qp_state=state)

    def close(self) -> None:
        _free(self, self._ib.VerbsError)


def _no_region(size_bytes: int, error: Exception) -> str:
    return f"the device takes no region of {size_bytes} bytes ({error!r}); see: ulimit -l"


# ---------------------------------------------------------------- pyverbs


class _PyverbsPair:
    """A queue pair by `pyverbs`.

    Writes go through the extended queue pair: a `SendWR` of pyverbs leaks memory with each that is
    made, and cannot be changed afterwards.
    """

    waits_freely = False

    def __init__(self, port: Port, n_receives: int) -> None:
        from pyverbs import cq, device, enums, pd, qp
        from pyverbs.pyverbs_error import PyverbsError
        from pyverbs.wr import SGE

        self._enums = enums
        self._error = PyverbsError
        self._port = port
        self._regions: list[object] = []
        self._failure = ""
        self._n_completed = 0
        try:
            with _loading:
                # pyverbs keeps the descriptors of its event files to itself.
                self.async_fd, self._context = _event_file(lambda: device.Context(name=port.device))
                self.event_fd, self._channel = _event_file(lambda: cq.CompChannel(self._context))
            self._domain = pd.PD(self._context)
            self._sent = cq.CQ(self._context, SEND_DEPTH)
            self._arrived = cq.CQ(self._context, n_receives, None, self._channel, 0)
            operations = enums.IBV_QP_EX_WITH_RDMA_WRITE
            operations |= enums.IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM
            self._pair = qp.QPEx(
                self._context,
                qp.QPInitAttrEx(
                    qp_type=enums.IBV_QPT_RC,
                    scq=self._sent,
                    rcq=self._arrived,
                    cap=qp.QPCap(max_send_wr=SEND_DEPTH, max_recv_wr=n_receives),
                    pd=self._domain,
                    comp_mask=enums.IBV_QP_INIT_ATTR_PD | enums.IBV_QP_INIT_ATTR_SEND_OPS_FLAGS,
                    send_ops_flags=operations,
                ),
            )
            mtu = self._context.query_port(port.number).active_mtu
            first = qp.QPAttr(port_num=port.number)
            first.qp_access_flags = enums.IBV_ACCESS_REMOTE_WRITE
            self._pair.to_init(first)
        except PyverbsError as error:
            raise LeaseRefused(f"{port.device} gives no queue pair: {error!r}") from error
        self.address = Address(self._pair.qp_num, _first_packet(), port.gid, port.lid, mtu)
        self._piece = SGE(0, 0, 0)

    def register(self, memory: mmap.mmap, is_remote_writable: bool) -> Region:
        from pyverbs.mr import MR
        from pyverbs.wr import SGE, RecvWR

        flags = self._enums.IBV_ACCESS_LOCAL_WRITE
        if is_remote_writable:
            flags |= self._enums.IBV_ACCESS_REMOTE_WRITE
        address = _address_of(memory)
        try:
            region = MR(self._domain, len(memory), flags, address)
        except self._error as error:
            raise LeaseRefused(_no_region(len(memory), error)) from error
        self._regions.append(region)
        # A receive has to have a place, although a write with an immediate value uses none.
        self._receive = RecvWR(num_sge=1, sg=[SGE(address, 8, region.lkey)])
        return Region(address, len(memory), region.lkey, region.rkey)

    def connect(self, peer: Address) -> None:
        from pyverbs.addr import GID, AHAttr, GlobalRoute
        from pyverbs.qp import QPAttr

        gid = GID(":".join(peer.gid[at : at + 2].hex() for at in range(0, 16, 2)))
        route = GlobalRoute(gid, sgid_index=self._port.gid_index, hop_limit=64)
        way = AHAttr(gr=route, is_global=1, port_num=self._port.number, dlid=peer.lid)
        wanted = QPAttr(port_num=self._port.number)
        wanted.path_mtu = min(peer.mtu, self.address.mtu)
        wanted.dest_qp_num = peer.number
        wanted.rq_psn = peer.packet
        wanted.sq_psn = self.address.packet
        wanted.max_dest_rd_atomic = wanted.max_rd_atomic = 1
        wanted.min_rnr_timer = RNR_TIMER
        wanted.timeout = ACK_TIMEOUT
        wanted.retry_cnt = N_RETRIES
        wanted.rnr_retry = N_RNR_RETRIES
        wanted.ah_attr = way
        try:
            self._pair.to_rts(wanted)
        except self._error as error:
            raise LeaseLost(f"no way from {self._port.device} to the peer: {error!r}") from error

    def write(
        self,
        source: Region,
        offset: int,
        size_bytes: int,
        address: int,
        remote_key: int,
        immediate: int | None,
        count: int | None,
    ) -> None:
        pair, piece = self._pair, self._piece
        piece.addr = source.address + offset
        piece.length = size_bytes
        piece.lkey = source.local_key
        try:
            pair.wr_start()
            pair.wr_flags = 0 if count is None else self._enums.IBV_SEND_SIGNALED
            pair.wr_id = count or 0
            if immediate is None:
                pair.wr_rdma_write(remote_key, address)
            else:
                # In the network's order; what arrives has been turned around by pyverbs.
                pair.wr_rdma_write_imm(remote_key, address, socket.htonl(immediate))
            pair.wr_set_sge(piece)
            pair.wr_complete()
        except self._error as error:
            raise LeaseLost(f"the queue pair takes no more writes: {error!r}") from error

    def n_completed(self) -> int:
        for completion in self._sent.poll(SEND_DEPTH)[1]:
            if completion.status:
                self._note(completion.status)
                raise LeaseLost(self.failure())
            self._n_completed = completion.wr_id
        return self._n_completed

    def receive(self, n: int) -> None:
        try:
            for _ in range(n):
                self._pair.post_recv(self._receive)
        except self._error as error:
            raise LeaseLost(f"the queue pair takes no more receives: {error!r}") from error

    def arrivals(self) -> list[int]:
        n, completions = self._arrived.poll(16)
        if not n and not self._failure:
            return []
        came = []
        for completion in completions:
            if completion.status:
                self._note(completion.status)
                break
            came.append(completion.imm_data)
        if not came:
            raise LeaseLost(self.failure())
        return came

    def arm(self) -> None:
        self._arrived.req_notify()

    def take_event(self) -> None:
        # Holds the interpreter's lock while it waits: what waits is epoll, before this is called.
        self._channel.get_cq_event(self._arrived)
        self._arrived.ack_events(1)

    def _note(self, status: int) -> None:
        from pyverbs.cq import cqe_status_to_str

        if not self._failure or status != self._enums.IBV_WC_WR_FLUSH_ERR:
            self._failure = cqe_status_to_str(status)

    def failure(self) -> str:
        for completion in self._sent.poll(SEND_DEPTH)[1]:
            if completion.status:
                self._note(completion.status)
        return f"the connection on {self._port.device} has failed: {self._failure or 'cut'}"

    def stop(self) -> None:
        from pyverbs.qp import QPAttr

        with contextlib.suppress(self._error):
            failed = QPAttr(qp_state=self._enums.IBV_QPS_ERR)
            self._pair.modify(failed, self._enums.IBV_QP_STATE)

    def close(self) -> None:
        _free(self, self._error)


def _free(pair: _IbverbsPair | _PyverbsPair, error: type[Exception]) -> None:
    """Free from the leaves: nothing goes on which something else still hangs."""
    own = (pair._pair, pair._arrived, pair._sent, pair._channel, pair._domain, pair._context)
    for part in (*pair._regions, *own):
        with contextlib.suppress(error):
            part.close()


def _event_file(open_it: Callable[[], T]) -> tuple[int, T]:
    """Call, and return the descriptor of the event file that this has opened."""
    before = _event_files()
    opened = open_it()
    (new,) = _event_files() - before
    return new, opened


def _event_files() -> set[int]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[infinibandevent]":
                found.add(int(name))
    return found

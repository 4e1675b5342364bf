"""Runs a command under a guest kernel that has an RDMA device, on a machine whose own has none.

The guest sees this machine's root folder, read-only, and this repository, writable, at their own
paths; /tmp, /run, /var/tmp and /dev/shm are empty. So the same virtual environment works in it. Its
device is rdma_rxe, which speaks RoCE v2 over an Ethernet that leads nowhere, or to a second guest.

- uml: User-Mode Linux, an ordinary process. Starts in a second, and runs Python at full speed, on
  one processor (who polls there makes the other end wait for a time slice). Has to be built once
  (`build_kernel.sh`), into the user's cache folder.
- qemu: Debian's own kernel, emulated. Nothing to build and two processors, but a start of half a
  minute, and everything ten times slower.

Building takes five minutes of a quiet machine with two cores; after that the tests take less than
a minute, and in QEMU they would take ten. So it is built wherever it can be, and QEMU serves what
polls, and machines on which the build fails.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wukong" / "guest"
ADDRESSES = ("198.18.0.1", "198.18.0.2")
MEMORY_MB = 1024
NO_STATUS = 125
"""Exit status of a guest that ended without one, like that of `timeout` and `docker run`."""
TIMED_OUT = 124
LOOK_S = 0.02
"""Between two looks at a guest's output."""


class NoGuest(Exception):
    """No guest can run here; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """Something that can be started as a guest."""

    backend: str
    """"uml" or "qemu"."""
    path: Path
    """The User-Mode Linux executable, or the folder of `prepare_qemu.sh`."""


def uml_path() -> Path:
    """Where the built kernel is kept; a change of its sources is another kernel."""
    made_of = b"".join((HERE / name).read_bytes() for name in ("build_kernel.sh", "kernel.config"))
    return CACHE / f"linux-{hashlib.sha256(made_of).hexdigest()[:12]}"


def find_kernel(backend: str = "auto") -> Kernel:
    """Return a kernel, after building or installing it where that is possible.

    Args:
        backend: "uml", "qemu", or "auto": uml where it is or can be built, else qemu.
    Raises:
        NoGuest: neither is here, nor can be made.
    Cost: nothing once it is there; before, 9 CPU minutes (uml), or 250 MB of packages (qemu).
    """
    reasons = []
    if backend in ("uml", "auto"):
        path = uml_path()
        try:
            if not path.exists():
                install_tools()
                _prepare("build_kernel.sh", path, "a User-Mode Linux kernel (9 CPU minutes, once)")
            return Kernel("uml", path)
        except NoGuest as error:
            reasons.append(str(error))
    if backend in ("qemu", "auto"):
        path = CACHE / "qemu"
        try:
            if not (path / "initrd").exists() or not shutil.which("qemu-system-x86_64"):
                _prepare("prepare_qemu.sh", path, "QEMU and Debian's kernel")
            return Kernel("qemu", path)
        except NoGuest as error:
            reasons.append(str(error))
    raise NoGuest("; ".join(reasons) or f"no such backend: {backend}")


def install_verbs() -> None:
    """Install what uses the device: libibverbs with the driver of rdma_rxe, and its tools.

    Raises:
        NoGuest: it is missing and cannot be installed.
    """
    packages = [] if _has_provider() else ["ibverbs-providers"]
    if not Path("/usr/lib/python3/dist-packages/pyverbs").is_dir():
        packages.append("python3-pyverbs")
    _install({"ibv_rc_pingpong": "ibverbs-utils", "rdma": "iproute2"}, packages)


def install_tools() -> None:
    """Install what building the kernel takes.

    Raises:
        NoGuest: it is missing and cannot be installed.
    """
    tools = ("flex", "bison", "bc", "make", "gcc")
    packages = [] if Path("/usr/include/stdio.h").exists() else ["libc6-dev"]
    _install({"xz": "xz-utils", **{tool: tool for tool in tools}}, packages)


def _has_provider() -> bool:
    return any(Path("/usr/lib").glob("*/libibverbs/librxe-*.so"))


def _install(tools: dict[str, str], packages: list[str]) -> None:
    """Install packages, and those of the tools that are not here."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = [package for tool, package in tools.items() if not shutil.which(tool, path=path)]
    missing += packages
    if missing:
        _need_apt(", ".join(missing))
        _apt("update", "-qq")
        _apt("install", "-y", "-qq", "--no-install-recommends", *missing)


def _prepare(script: str, path: Path, what: str) -> None:
    _need_apt(what)
    sys.stderr.write(f"making {what} in {CACHE}\n")
    _apt("update", "-qq")
    done = subprocess.run(["nice", str(HERE / script), str(path)], stdin=subprocess.DEVNULL)
    if done.returncode:
        raise NoGuest(f"{script} ended with status {done.returncode}")


def _need_apt(what: str) -> None:
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise NoGuest(f"{what} is missing, and only root on Debian can make or install it here")


def _apt(*arguments: str) -> None:
    done = subprocess.run(
        ["apt-get", *arguments],
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        sys.stderr.write(done.stderr)
        raise NoGuest(f"apt-get {shlex.join(arguments)} ended with status {done.returncode}")


class Guest:
    """One running guest. Its output is printed while it comes, each line behind `label`."""

    def __init__(
        self, kernel: Kernel, command: str, number: int, wire: socket.socket | None, label: str
    ) -> None:
        self._label = label
        self.folder = Path(tempfile.mkdtemp(prefix="wukong-guest-"))
        self._write(command, number)
        start = _start_uml if kernel.backend == "uml" else _start_qemu
        with (self.folder / "console").open("wb") as console:
            self._process = start(kernel.path, self.folder, number, wire, console)
        self._shown = 0

    def _write(self, command: str, number: int) -> None:
        """What the guest reads: who it is, and what it runs."""
        environment = {
            "REPO": str(REPOSITORY),
            "GUEST_NAME": f"guest{number}",
            "GUEST_ADDRESS": ADDRESSES[number],
            "PEER_ADDRESS": ADDRESSES[1 - number],
            "PYTHON": sys.executable,
            "PYTHONPATH": str(REPOSITORY),
            "PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "TERM": "dumb",
            "WUKONG_GUEST": "1",
            "CI": os.environ.get("CI", ""),
        }
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in environment.items()]
        (self.folder / "env").write_text("".join(lines))
        (self.folder / "command").write_text(command + "\n")
        (self.folder / "output").touch()

    def show(self) -> None:
        """Print what has come since."""
        with (self.folder / "output").open("rb") as output:
            output.seek(self._shown)
            new = output.read()
        if self._label:
            new = new[: new.rfind(b"\n") + 1]
        self._shown += len(new)
        text = new.decode(errors="replace")
        if text:
            sys.stdout.write("".join(self._label + line for line in text.splitlines(True)))
            sys.stdout.flush()

    def is_over(self) -> bool:
        """Whether the guest has ended."""
        return self._process.poll() is not None

    def status(self) -> int:
        """The command's exit status, after the end."""
        try:
            return int((self.folder / "status").read_text())
        except (OSError, ValueError):
            console = (self.folder / "console").read_text(errors="replace")
            sys.stderr.write(f"the guest left no exit status; its console:\n{console[-3000:]}\n")
            return NO_STATUS

    def close(self) -> None:
        """End it, if it still runs, and remove its folder."""
        # User-Mode Linux is a process for each of its own; all of them are in the group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def _start_uml(
    path: Path, folder: Path, number: int, wire: socket.socket | None, console: IO[bytes]
) -> subprocess.Popen[bytes]:
    arguments = [
        str(path),
        f"mem={MEMORY_MB}M",
        *("root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro"),
        f"init={HERE / 'uml_init.sh'}",
        f"WUKONG_RUN={folder}",
        *("con=null", "con0=null,fd:1", "ssl=null", "quiet", "loglevel=3"),
        *(f"umid=guest{number}", f"uml_dir={folder}"),
    ]
    if wire is not None:
        mac = f"02:00:00:00:00:{number + 1:02x}"
        arguments.append(f"vec0:transport=fd,fd={wire.fileno()},mac={mac},depth=128,gro=0")
    return subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=console,
        stderr=console,
        pass_fds=() if wire is None else (wire.fileno(),),
        # The guest's memory is a file in TMPDIR, which has no name any more.
        env={"HOME": str(folder), "TMPDIR": "/dev/shm", "PATH": os.environ["PATH"]},
        cwd=folder,
        start_new_session=True,
    )


def _start_qemu(
    path: Path, folder: Path, number: int, wire: socket.socket | None, console: IO[bytes]
) -> subprocess.Popen[bytes]:
    network = ["-nic", "none"]
    if wire is not None:
        mac = f"02:00:00:00:00:{number + 1:02x}"
        network = ["-netdev", f"dgram,id=net,local.type=fd,local.str={wire.fileno()}"]
        network += ["-device", f"virtio-net-pci,netdev=net,mac={mac}"]
    shares = [
        ("host", "/", ",readonly=on,multidevs=remap"),
        ("run", str(folder), ""),
        ("repo", str(REPOSITORY), ""),
    ]
    arguments = [
        *("qemu-system-x86_64", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,-la57"),
        *("-smp", "2", "-m", str(MEMORY_MB), "-nodefaults", "-no-user-config", "-no-reboot"),
        *("-display", "none", "-serial", "stdio"),
        *("-kernel", str(path / "vmlinuz"), "-initrd", str(path / "initrd"), "-append"),
        "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check audit=0"
        " random.trust_cpu=on",
        *network,
    ]
    for tag, shared, options in shares:
        virtfs = f"local,path={shared},mount_tag={tag},security_model=none{options}"
        arguments += ["-virtfs", virtfs]
    return subprocess.Popen(
        arguments,
        stdin=subprocess.DEVNULL,
        stdout=console,
        stderr=console,
        pass_fds=() if wire is None else (wire.fileno(),),
        start_new_session=True,
    )


def run_guests(kernel: Kernel, commands: Sequence[str], timeout_s: float = 600.0) -> int:
    """Run each command in a guest of its own; two guests are two hosts on one Ethernet.

    Each finds its address in GUEST_ADDRESS and the other's in PEER_ADDRESS.

    Args:
        commands: for bash, in this repository's folder; one or two.
        timeout_s: then all are ended.
    Returns: the first exit status that is not 0, TIMED_OUT, or NO_STATUS if a guest failed.
    """
    wires: list[socket.socket | None] = [None]
    if len(commands) == 2:
        ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for end in ends:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        wires = list(ends)
    guests: list[Guest] = []
    deadline = time.monotonic() + timeout_s
    try:
        for number, (command, wire) in enumerate(zip(commands, wires)):
            label = f"[host {number}] " if len(commands) == 2 else ""
            guests.append(Guest(kernel, command, number, wire, label))
        while not all(guest.is_over() for guest in guests):
            if time.monotonic() > deadline:
                return TIMED_OUT
            time.sleep(LOOK_S)
            for guest in guests:
                guest.show()
        for guest in guests:
            guest.show()
        return next((status for guest in guests if (status := guest.status())), 0)
    finally:
        for guest in guests:
            guest.close()
        for wire in wires:
            if wire is not None:
                wire.close()

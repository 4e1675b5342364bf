"""Which nodes have executors to lease: one small file for each agent, in a shared directory.

    DIRECTORY/           of the user, nobody else may write to it
      secret             32 random bytes, mode 0600: who can read it can lease executors
      agents/NODE-ID     JSON, written anew with each heartbeat, and by renaming: never half a file

The directory lies on a file system that all nodes share, or on this machine only. An agent grants
by itself; what stands here is a hint, and old when it is read.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import stat
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from wukong.errors import LeaseRefused, SecurityError

SECRET_BYTES = 32
HEARTBEAT_S = 2.0
STALE_S = 30.0
"""A file that was not written for so long is of a dead agent: several heartbeats, and more than the
clocks of a cluster's machines differ."""


@dataclass(frozen=True, slots=True)
class Registration:
    """One agent, as it described itself."""

    name: str
    """Unique."""
    node: str
    """The machine's name, for people."""
    boot: str
    """Which start of which machine: who has the same is on the same node."""
    pid: int
    unix: str
    """Name of its abstract unix socket."""
    tcp: tuple[str, int] | None
    """None: reachable from its own node only."""
    is_tls: bool
    transports: tuple[str, ...]
    n_cores: int
    n_free_cores: int
    free_memory_bytes: int
    heartbeat_at: float
    """By the node's own clock."""


def default_directory() -> Path:
    """Where the agents of this user register when nothing else is said."""
    usual = Path(tempfile.gettempdir()) / f"wukong-agents-{os.getuid()}"
    return Path(os.environ.get("WUKONG_AGENTS") or usual)


def boot_id() -> str:
    """The same for all processes of this start of this machine (and of its network namespace)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"
    except OSError:
        return socket.gethostname()


def open_secret(directory: Path) -> bytes:
    """Read the secret of a directory; both are made where they are missing.

    Raises:
        SecurityError: others may write to the directory, or read the secret.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise SecurityError(f"{directory} is not this user's alone: others could lease executors")
    (directory / "agents").mkdir(mode=0o700, exist_ok=True)
    path = directory / "secret"
    if not path.exists():
        draft = directory / f".secret-{secrets.token_hex(8)}"
        draft.touch(mode=0o600)
        draft.write_bytes(secrets.token_bytes(SECRET_BYTES))
        # The first one wins, on every file system.
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
        draft.unlink()
    if path.stat().st_mode & 0o077:
        raise SecurityError(f"{path} can be read by others")
    return path.read_bytes()


def write_registration(directory: Path, registration: Registration) -> None:
    """Show an agent, or its latest state."""
    path = directory / "agents" / registration.name
    draft = path.with_name(f".{registration.name}")
    draft.write_text(json.dumps(asdict(registration)), encoding="utf-8")
    draft.replace(path)


def remove_registration(directory: Path, name: str) -> None:
    """Take an agent away. Idempotent."""
    (directory / "agents" / name).unlink(missing_ok=True)


def read_registrations(directory: Path) -> list[Registration]:
    """All living agents, those of this node first; files of dead ones are removed."""
    found = []
    own_boot, now = boot_id(), time.time()
    for path in sorted((directory / "agents").glob("[!.]*")):
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            fields["tcp"] = fields["tcp"] and (fields["tcp"][0], fields["tcp"][1])
            fields["transports"] = tuple(fields["transports"])
            registration = Registration(**fields)
        except (FileNotFoundError, ValueError, TypeError, KeyError):
            continue  # it has just ended, or is none
        is_here = registration.boot == own_boot
        is_dead = is_here and not Path(f"/proc/{registration.pid}").exists()
        if is_dead or now - registration.heartbeat_at > STALE_S:
            with contextlib.suppress(OSError):
                path.unlink()
            continue
        found.append(registration)
    return sorted(found, key=lambda r: (r.boot != own_boot, -r.n_free_cores, r.name))


def no_agents(directory: Path) -> LeaseRefused:
    """What to say when nobody is registered."""
    return LeaseRefused(
        f"no agent is registered in {directory}: start one on each node with `wukong agent"
        f" --directory {directory}`"
    )

"""URLs of Redis and Valkey: what they say, and what they do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit

SCHEMES = ("redis", "rediss", "redis+cluster", "rediss+cluster", "unix")
TIMEOUT_S = 5.0
"""A reply that takes longer will not come: scripts run for milliseconds."""


class Address(NamedTuple):
    """Where a server listens: a port, or a unix socket (port 0)."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """What a URL says.

    redis://[user:password@]host:port[/database][?option=value&...], rediss:// for TLS,
    redis+cluster:// and rediss+cluster:// (nodes separated by commas), unix:///path/of/socket.
    """

    addresses: tuple[Address, ...]
    is_cluster: bool
    prefix: str
    """Of all keys and channels."""
    lease_s: float
    """A job that nobody has renewed for this long vanishes."""
    chunk_bytes: int
    """A longer blob is stored in pieces of this size."""
    n_replicas: int
    """Replicas that must have a change before it counts as durable; all, where there are fewer."""
    is_on_disk: bool
    """A change must be on the server's disk before it counts as durable (Redis 7.2, Valkey)."""
    timeout_s: float
    options: dict[str, Any]
    """redis-py's, of a connection."""
    is_encrypted: bool

    def __str__(self) -> str:
        """The URL without its password, for messages."""
        listed = ",".join(f"{host}:{port}" if port else host for host, port in self.addresses)
        return f"redis{'s' if self.is_encrypted else ''}://{listed}"

    @property
    def is_durable(self) -> bool:
        """Something has to be waited for before a change is sure to survive."""
        return self.n_replicas > 0 or self.is_on_disk


def parse_url(url: str) -> RedisUrl:
    """Read a URL.

    Raises:
        ValueError: it is none, or an option has no such value.
        ImportError: redis-py is missing; install `wukong[redis]`.
    """
    connection = import_redis().connection
    parts = urlsplit(url)
    scheme, _, kind = parts.scheme.partition("+")
    if parts.scheme not in SCHEMES:
        raise ValueError(f"no such store: {parts.scheme}://; there are {', '.join(SCHEMES)}")
    own = dict(parse_qsl(parts.query))
    prefix = own.pop("prefix", "wukong:")
    if not prefix or set(prefix) & set("{}*?[]\\ "):
        raise ValueError(f"a prefix of keys has no braces, blanks or wildcards: {prefix!r}")
    lease_s = float(own.pop("lease_s", 3600.0))
    chunk_bytes = int(own.pop("chunk_bytes", 16 << 20))
    n_replicas = int(own.pop("replicas", 0))
    is_on_disk = own.pop("on_disk", "no") == "yes"
    timeout_s = float(own.pop("timeout_s", TIMEOUT_S))
    if lease_s <= 0 or chunk_bytes <= 0 or timeout_s <= 0 or n_replicas < 0:
        raise ValueError("lease_s, chunk_bytes and timeout_s are positive, replicas is 0 or more")
    login, _, hosts = parts.netloc.rpartition("@")
    addresses = []
    options: dict[str, Any] = {}
    for host in hosts.split(","):
        netloc = f"{login}@{host}" if login else host
        options = connection.parse_url(f"{scheme}://{netloc}{parts.path}?{parts.query}")
        # A URL's own options are read above; what is left is redis-py's.
        for name in ("prefix", "lease_s", "chunk_bytes", "replicas", "on_disk", "timeout_s"):
            options.pop(name, None)
        options.pop("connection_class", None)
        path = options.pop("path", None)
        port = options.pop("port", 6379)
        addresses.append(Address(path or options.pop("host", "localhost"), 0 if path else port))
    return RedisUrl(
        addresses=tuple(addresses),
        is_cluster=kind == "cluster",
        prefix=prefix,
        lease_s=lease_s,
        chunk_bytes=chunk_bytes,
        n_replicas=n_replicas,
        is_on_disk=is_on_disk,
        timeout_s=timeout_s,
        options=options,
        is_encrypted=scheme == "rediss",
    )


def with_options(url: str, **defaults: object) -> str:
    """A URL with options added that it does not name itself."""
    parts = urlsplit(url)
    options = {k: str(v) for k, v in defaults.items()} | dict(parse_qsl(parts.query))
    query = urlencode(options)
    return f"{parts.scheme}://{parts.netloc}{parts.path}" + (f"?{query}" if query else "")


def import_redis() -> Any:
    """redis-py, which is optional.

    Raises:
        ImportError: it says what to install.
    """
    try:
        import redis
        import redis.connection
    except ImportError as error:
        raise ImportError("stores on Redis need redis-py: pip install 'wukong[redis]'") from error
    return redis

"""Where jobs and values are in tests of faults: one text of tests, and every kind of store.

A place is what a `LocalCluster` is given, and what a test does behind the store's back: look at
what is left, and damage a value.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import wukong
from wukong.storage import Store, open_store
from wukong.storage.local_files import remove_directory

Damage = Callable[[bytes], "bytes | None"]
"""What becomes of a value; None: it is gone."""


class Place:
    """A store of some kind.

    Args:
        options: of `LocalCluster`.
    """

    patience = 3.0
    """By so much it may take longer than in shared memory to replace an executor that has died."""

    def __init__(self, **options: object) -> None:
        self.options = options

    @property
    def where(self) -> str:
        """As `wukong.attach` and `wukong sweep` take it."""
        return str(self.options.get("store") or self.options["directory"])

    @property
    def blobs(self) -> str | None:
        """As `wukong.attach` takes it."""
        found = self.options.get("blobs")
        return None if found is None else str(found)

    def cluster(self, n_workers: int = 2, **options: object) -> wukong.LocalCluster:
        return wukong.LocalCluster(n_workers, **{**self.options, **options})

    @contextlib.contextmanager
    def opened(self) -> Iterator[Store]:
        url = self.where if "://" in self.where else f"local://{self.where}"
        store = open_store(url, blobs=self.blobs)
        try:
            yield store
        finally:
            store.jobs.close()

    def attach(self, job: str) -> object:
        return wukong.attach(job, self.where, timeout_s=60, blobs=self.blobs)

    def left(self) -> list[str]:
        """What lies there, seen behind the store's back."""
        raise NotImplementedError

    def large_values(self) -> list[str]:
        """Names of the large values that lie there."""
        raise NotImplementedError

    def damage(self, name: str, how: Damage) -> None:
        """Change a large value behind the store's back."""
        raise NotImplementedError

    def n_scripts(self) -> int | None:
        """How often the servers have run one of our scripts; None: there is no server."""
        return None

    def remove(self) -> None:
        """End what was started for it."""


class Folder(Place):
    """Shared memory of this machine."""

    patience = 1.0

    def __init__(self) -> None:
        # Not one of the default ones, which any cluster removes that finds them without a user.
        self._directory = Path(tempfile.mkdtemp())
        super().__init__(directory=str(self._directory))

    def left(self) -> list[str]:
        with self.opened() as store:
            return [*store.jobs.jobs(), *self.large_values()]

    def large_values(self) -> list[str]:
        blobs = self._directory / "blobs"
        return sorted(
            str(path) for path in blobs.rglob("*") if path.is_file() and path.stat().st_size > 1000
        )

    def damage(self, name: str, how: Damage) -> None:
        content = how(Path(name).read_bytes())
        if content is None:
            os.unlink(name)
            return
        # In place: executors may have it mapped.
        with open(name, "r+b") as file:
            file.write(content)
            file.truncate()

    def remove(self) -> None:
        remove_directory(self._directory)


class OnRedis(Place):
    """A Redis, and perhaps S3 beside it.

    Args:
        kind: of `redis_servers`.
        blobs: where large values are; None: in Redis.
    """

    def __init__(self, kind: str, blobs: str | None = None) -> None:
        import redis_servers

        self._folder = tempfile.mkdtemp()
        self._server = getattr(redis_servers, kind)(Path(self._folder))
        self._servers = getattr(self._server, "servers", [self._server])
        options = {"store": self._server.url} | ({"blobs": blobs} if blobs else {})
        super().__init__(**options)

    def left(self) -> list[str]:
        keys = [key for server in self._servers for key in server.keys("*")]
        return keys + ([] if self.blobs is None else self.large_values())

    def large_values(self) -> list[str]:
        if self.blobs is not None:
            with s3_objects(self.blobs) as (client, bucket, prefix):
                listed = client.list_objects_v2(Bucket=bucket, Prefix=prefix)
                return [item["Key"] for item in listed.get("Contents", ())]
        return sorted(key for server in self._servers for key in server.keys("wukong:b:*"))

    def damage(self, name: str, how: Damage) -> None:
        if self.blobs is not None:
            with s3_objects(self.blobs) as (client, bucket, _):
                content = how(client.get_object(Bucket=bucket, Key=name)["Body"].read())
                if content is None:
                    client.delete_object(Bucket=bucket, Key=name)
                else:
                    client.put_object(Bucket=bucket, Key=name, Body=content)
            return
        from wukong.storage.redis_link import Command, Link, pack
        from wukong.storage.redis_url import parse_url

        link, key = Link(parse_url(self._server.onlooker_url)), name.encode()
        try:
            content = how(link.run_checked([Command(key, pack(b"GET", key))])[0])
            change = pack(b"DEL", key) if content is None else pack(b"SET", key, content)
            link.run_checked([Command(key, change)])
        finally:
            link.close()

    def n_scripts(self) -> int | None:
        from redis_servers import n_calls

        return sum(n_calls(server, "evalsha") for server in self._servers)

    def remove(self) -> None:
        self._server.stop()
        shutil.rmtree(self._folder)


@contextlib.contextmanager
def s3_objects(url: str) -> Iterator[tuple[object, str, str]]:
    """A client of the SDK's own, and the place that a URL names."""
    import boto3

    from wukong.storage.s3_session import parse_url

    options = parse_url(url)
    client = boto3.client(
        "s3",
        endpoint_url=options.endpoint_url,
        region_name=options.region,
        aws_access_key_id=options.access_key,
        aws_secret_access_key=options.secret_key,
    )
    try:
        yield client, options.bucket, options.prefix
    finally:
        client.close()


_numbers = itertools.count()


def s3_url(endpoint: str, tier_bytes: int | None) -> str:
    """A bucket of its own at some endpoint of S3."""
    from moto_service import KEY, SECRET, make_bucket

    bucket = f"faults-{next(_numbers)}"
    make_bucket(endpoint, bucket)
    tier = "" if tier_bytes is None else f"&tier_bytes={tier_bytes}"
    return f"s3://{KEY}:{SECRET}@{bucket}/jobs?endpoint_url={endpoint}&region=us-east-1{tier}"


KINDS: dict[str, Callable[[Callable[[], str]], Place]] = {
    "shared memory": lambda s3: Folder(),
    "Redis": lambda s3: OnRedis("Server"),
    "Redis Cluster": lambda s3: OnRedis("ServerCluster"),
    "TLS and ACL": lambda s3: OnRedis("TlsServer"),
    "S3": lambda s3: OnRedis("Server", s3_url(s3(), 0)),
    "tiers": lambda s3: OnRedis("Server", s3_url(s3(), None)),
}
"""The kinds; `tiers` has the usual threshold, and `S3` has every value there that is no row."""


def open_place(kind: str, s3: Callable[[], str]) -> Place:
    """A place of some kind; the test is skipped where what it needs is missing.

    Args:
        s3: the endpoint of an S3, which is asked for where it is needed.
    """
    from moto_service import needs

    if kind != "shared memory":
        needs("redis", "msgpack")
    return KINDS[kind](s3)

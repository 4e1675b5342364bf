"""Blobs in S3, or in anything that speaks its protocol: `s3://bucket/prefix?region=...`.

    <prefix>/<job>/<attempt>/<number>-<size>      one object a blob

One blob of up to `part_bytes` is one call of boto3, in the caller's thread. Everything else goes to
S3 at once, as far as connections and memory allow: aiobotocore, in a thread of its own. Large blobs
are written as multipart uploads and read in ranges, which need no question first, since a blob's id
says its size.

The SDK repeats requests (`retry_mode`); bodies that break off, which it does not cover, are read
again in `s3_session`. Beyond that all is `StoreUnavailable`, and a core decides.

What a job leaves behind goes with `delete_job`; of executors that were killed inside an upload, or
put something after the job had ended, a lifecycle rule of the bucket has to take care.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from wukong.errors import StoreUnavailable
from wukong.executor.messages import BlobId, JobId
from wukong.storage.contract import BlobStore, size_of_blob
from wukong.storage.s3_session import (
    READS_MAX,
    AsyncSide,
    BrokenOff,
    Options,
    PastTheEnd,
    make_client,
    translated,
)

T = TypeVar("T")

KEYS_PER_DELETE = 1000
"""The most that one DeleteObjects takes (S3 API reference)."""
PARTS_MAX = 10_000
"""The most that one multipart upload has (S3 User Guide, "Multipart upload limits")."""


class S3Blobs(BlobStore):
    """Blobs as objects under one prefix of a bucket. Thread-safe; open it after forking.

    Nothing is asked of S3 before the first call.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self._root = f"{options.prefix}/" if options.prefix else ""
        self._lock = threading.Lock()
        """Guards the making of what follows."""
        self._client: Any = None
        self._side: AsyncSide | None = None
        self._pid = os.getpid()

    # -------------------------------------------------------------- the contract

    def put_many(self, items: Sequence[tuple[BlobId, Sequence[memoryview]]]) -> None:
        """See `BlobStore.put_many`. Cost: a PUT a blob; above `part_bytes` one a part, and two."""
        try:
            if len(items) == 1 and _n_bytes(items[0][1]) <= self.options.part_bytes:
                ((blob, parts),) = items
                with self._asked("PutObject", blob) as client:
                    client.put_object(**self._at(blob), Body=b"".join(parts))
            elif items:
                side = self._aside()
                self._together(side, [self._put(side, blob, parts) for blob, parts in items])
        except BaseException:
            with contextlib.suppress(StoreUnavailable):
                self.delete_many([blob for blob, _ in items])
            raise

    def get_many(self, ids: Sequence[BlobId]) -> list[memoryview]:
        """See `BlobStore.get_many`. Cost: a GET a blob; one for each `part_bytes` of larger ones.

        A blob that is shorter in S3 than its id says comes back as short as it is: its reader
        finds it damaged.
        """
        if not ids:
            return []
        if len(ids) == 1 and size_of_blob(ids[0]) <= self.options.part_bytes:
            return [memoryview(self._get_single(ids[0]))]
        side = self._aside()
        return [*self._together(side, [self._get(side, blob) for blob in ids])]

    def delete_many(self, ids: Sequence[BlobId]) -> None:
        """See `BlobStore.delete_many`. Cost: one request for each 1,000."""
        self._delete([self._key(blob) for blob in ids])

    def delete_job(self, job: JobId) -> None:
        """See `BlobStore.delete_job`; unfinished uploads too. Cost: two listings at least."""
        self._delete([key for key, _ in self._list(f"{job}/")])
        with self._asked("ListMultipartUploads", job) as client:
            bucket = {"Bucket": self.options.bucket}
            found = client.list_multipart_uploads(**bucket, Prefix=f"{self._root}{job}/")
            for upload in found.get("Uploads", ()):
                place = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                client.abort_multipart_upload(**bucket, **place)

    def used_bytes(self) -> int:
        """See `BlobStore.used_bytes`. Cost: a listing of the whole prefix."""
        return sum(size_bytes for _, size_bytes in self._list(""))

    def list(self, job: str) -> list[str]:
        """The ids of a job's blobs, sorted."""
        return sorted(key.removeprefix(self._root) for key, _ in self._list(f"{job}/"))

    def close(self) -> None:
        """See `BlobStore.close`."""
        with self._lock:
            side, self._side = self._side, None
            client, self._client = self._client, None
        if self._pid == os.getpid():
            if side is not None:
                side.close()
            if client is not None:
                client.close()

    # -------------------------------------------------------------- one request

    def _get_single(self, blob: BlobId) -> bytearray:
        for n_left in reversed(range(READS_MAX)):
            try:
                with self._asked("GetObject", blob) as client:
                    reply = client.get_object(**self._at(blob))
                    with contextlib.closing(reply["Body"]) as body:
                        return bytearray(body.read())
            except BrokenOff:
                if not n_left:
                    raise
        raise AssertionError("it has returned or raised")

    def _delete(self, keys: Sequence[str]) -> None:
        for first in range(0, len(keys), KEYS_PER_DELETE):
            named = [{"Key": key} for key in keys[first : first + KEYS_PER_DELETE]]
            with self._asked("DeleteObjects", named[0]["Key"]) as client:
                reply = client.delete_objects(
                    Bucket=self.options.bucket, Delete={"Objects": named, "Quiet": True}
                )
            for error in reply.get("Errors", ()):
                if error.get("Code") != "NoSuchKey":
                    raise StoreUnavailable(
                        f"S3 refuses DeleteObjects of {error.get('Key')}: {error.get('Code')}"
                    )

    def _list(self, folder: str) -> Iterator[tuple[str, int]]:
        """Keys and sizes below a folder of the prefix."""
        with self._asked("ListObjectsV2", folder) as client:
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=self.options.bucket, Prefix=f"{self._root}{folder}"
            )
            listed = [found for page in pages for found in page.get("Contents", ())]
        for found in listed:
            yield found["Key"], found["Size"]

    @contextlib.contextmanager
    def _asked(self, action: str, name: str) -> Iterator[Any]:
        """The client for single calls, which may raise what it likes."""
        with self._lock:
            self._check_process()
            if self._client is None:
                self._client = make_client(self.options)
            client = self._client
        with translated(action, f"{self.options.bucket}/{self._root}{name}"):
            yield client

    # -------------------------------------------------------------- many requests

    async def _put(self, side: AsyncSide, blob: BlobId, parts: Sequence[memoryview]) -> None:
        n_bytes = _n_bytes(parts)
        part_bytes = max(self.options.part_bytes, -(-n_bytes // PARTS_MAX))
        at, name = self._at(blob), self._name(blob)
        if n_bytes <= part_bytes:
            async with side.room(n_bytes):
                await side.call("put_object", name, **at, Body=b"".join(parts))
            return
        begun = await side.call("create_multipart_upload", name, **at)
        upload = {**at, "UploadId": begun["UploadId"]}

        async def put_part(number: int, first: int) -> dict[str, Any]:
            size_bytes = min(part_bytes, n_bytes - first)
            async with side.room(size_bytes):
                body = b"".join(_cut(parts, first, size_bytes))
                place = {**upload, "PartNumber": number}
                reply = await side.call("upload_part", name, **place, Body=body)
            return {"PartNumber": number, "ETag": reply["ETag"]}

        try:
            starts = range(0, n_bytes, part_bytes)
            made = await side.all([put_part(i + 1, first) for i, first in enumerate(starts)])
            listed = {"MultipartUpload": {"Parts": made}}
            await side.call("complete_multipart_upload", name, **upload, **listed)
        except BaseException:
            with contextlib.suppress(StoreUnavailable):
                await side.call("abort_multipart_upload", name, **upload)
            raise

    async def _get(self, side: AsyncSide, blob: BlobId) -> memoryview:
        n_bytes, part_bytes = size_of_blob(blob), self.options.part_bytes
        at, name = self._at(blob), self._name(blob)
        if n_bytes <= part_bytes:
            async with side.room(n_bytes):
                return memoryview(bytearray(await side.get(name, **at)))
        whole = memoryview(bytearray(n_bytes))

        async def get_range(first: int) -> int:
            last = min(first + part_bytes, n_bytes) - 1
            async with side.room(last + 1 - first):
                try:
                    body = await side.get(name, **at, Range=f"bytes={first}-{last}")
                except PastTheEnd:
                    return 0
                whole[first : first + len(body)] = body
            return len(body)

        n_read = await side.all([get_range(first) for first in range(0, n_bytes, part_bytes)])
        return whole[: sum(n_read)]

    def _aside(self) -> AsyncSide:
        with self._lock:
            self._check_process()
            if self._side is None:
                self._side = AsyncSide(self.options)
            return self._side

    def _together(
        self, side: AsyncSide, coroutines: Sequence[Coroutine[Any, Any, T]]
    ) -> Sequence[T]:
        return side.run(side.all(coroutines))

    # -------------------------------------------------------------- names

    def _check_process(self) -> None:
        """In a fork, connections and threads are the parent's."""
        if self._pid != os.getpid():
            self._pid, self._client, self._side = os.getpid(), None, None

    def _key(self, blob: BlobId) -> str:
        return f"{self._root}{blob}"

    def _name(self, blob: BlobId) -> str:
        return f"{self.options.bucket}/{self._key(blob)}"

    def _at(self, blob: BlobId) -> dict[str, str]:
        return {"Bucket": self.options.bucket, "Key": self._key(blob)}


def _n_bytes(parts: Sequence[memoryview]) -> int:
    return sum(part.nbytes for part in parts)


def _cut(parts: Sequence[memoryview], first: int, size_bytes: int) -> Iterator[memoryview]:
    """Views of the bytes from `first` on, of parts that are thought of as joined."""
    end = first + size_bytes
    at = 0
    for part in parts:
        view = part.cast("B")
        if at < end and at + view.nbytes > first:
            yield view[max(0, first - at) : end - at]
        at += view.nbytes

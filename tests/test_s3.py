"""Blobs in S3 and in tiers, against moto's server; then the same with connections that fail."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import dask
import pytest
from moto_service import KEY, SECRET, make_bucket
from s3_proxy import FaultyProxy, every, start_proxy
from storage_contract_blobs import JOB, SIZES, BlobContract, blob_of, parts, pattern

import wukong
from wukong import errors
from wukong.storage import open_store
from wukong.storage.blobfiles import BlobFiles
from wukong.storage.contract import size_of_blob, sized_id, stem_of
from wukong.storage.s3 import S3Blobs
from wukong.storage.s3_session import parse_url
from wukong.storage.tiered import TieredBlobs

PART_BYTES = 65_536
"""Far below the least that Amazon takes (5 MiB), so that small blobs have parts here."""
BUCKET = "wukong-tests"
_prefixes = itertools.count()


@pytest.fixture(scope="session")
def bucket(moto_url: str) -> str:
    make_bucket(moto_url, BUCKET)
    return moto_url


def open_s3(endpoint: str, prefix: str = "", **options: object) -> S3Blobs:
    prefix = prefix or f"p/{next(_prefixes)}"
    given = {"region": "us-east-1", "part_bytes": PART_BYTES, "endpoint_url": endpoint, **options}
    query = "&".join(f"{name}={value}" for name, value in given.items())
    return S3Blobs(parse_url(f"s3://{KEY}:{SECRET}@{BUCKET}/{prefix}?{query}"))


@pytest.fixture(scope="module")
def shared_s3(bucket: str) -> Iterator[S3Blobs]:
    """One store for many tests: to make a client takes longer than most of them."""
    blobs = open_s3(bucket)
    yield blobs
    blobs.close()


@pytest.fixture
def s3(shared_s3: S3Blobs) -> Iterator[S3Blobs]:
    yield shared_s3
    shared_s3._delete([key for key, _ in shared_s3._list("")])


@pytest.mark.slow
class TestS3(BlobContract):
    @pytest.fixture
    def blobs(self, s3: S3Blobs) -> S3Blobs:
        return s3


class TestFiles(BlobContract):
    @pytest.fixture
    def blobs(self, tmp_path: Path) -> Iterator[BlobFiles]:
        store = BlobFiles(tmp_path / "root", tmp_path / "spill", 200_000)
        yield store
        store.close()


class TestTwoTiersOfFiles(BlobContract):
    @pytest.fixture
    def blobs(self, tmp_path: Path) -> Iterator[TieredBlobs]:
        folders = [BlobFiles(tmp_path / f"r{i}", tmp_path / f"s{i}", 200_000) for i in range(2)]
        store = TieredBlobs(*folders, 4096)
        yield store
        store.close()


@pytest.mark.slow
class TestFilesAndS3(BlobContract):
    @pytest.fixture
    def blobs(self, tmp_path: Path, s3: S3Blobs) -> Iterator[TieredBlobs]:
        files = BlobFiles(tmp_path / "root", tmp_path / "spill", 200_000)
        yield TieredBlobs(files, s3, 4096)
        files.close()


# ---------------------------------------------------------------- what goes to S3, counted


@pytest.fixture(scope="module")
def shared_proxy(bucket: str) -> Iterator[tuple[FaultyProxy, S3Blobs]]:
    with start_proxy(bucket) as proxy:
        blobs = open_s3(proxy.url, timeout_s=5, attempts_max=4)
        yield proxy, blobs
        blobs.close()


@pytest.fixture
def proxy(shared_proxy: tuple[FaultyProxy, S3Blobs]) -> Iterator[FaultyProxy]:
    proxy, _ = shared_proxy
    proxy.start_again()
    yield proxy
    proxy.start_again()


@pytest.fixture
def watched(shared_proxy: tuple[FaultyProxy, S3Blobs], proxy: FaultyProxy) -> Iterator[S3Blobs]:
    """A store behind the proxy."""
    _, blobs = shared_proxy
    yield blobs
    proxy.start_again()
    blobs.delete_job(JOB)


def methods(proxy: FaultyProxy) -> dict[str, int]:
    """How often each method was seen."""
    found = [method for method, _ in proxy.seen]
    return {method: found.count(method) for method in dict.fromkeys(found)}


@pytest.mark.slow
def test_nothing_is_asked_before_the_first_call(watched: S3Blobs, proxy: FaultyProxy) -> None:
    watched.get_many([])
    watched.delete_many([])
    assert proxy.seen == []


@pytest.mark.slow
def test_a_small_blob_is_one_request_each_way(watched: S3Blobs, proxy: FaultyProxy) -> None:
    content = pattern(PART_BYTES)
    blob = blob_of(0, content)
    watched.put_many([(blob, parts(content))])
    watched.get_many([blob])
    watched.delete_many([blob])
    assert methods(proxy) == {"PUT": 1, "GET": 1, "POST": 1}


@pytest.mark.slow
def test_a_large_blob_is_one_request_a_part_and_two(watched: S3Blobs, proxy: FaultyProxy) -> None:
    content = pattern(3 * PART_BYTES + 1)
    blob = blob_of(0, content)
    watched.put_many([(blob, parts(content[:10], content[10:]))])
    assert methods(proxy) == {"POST": 2, "PUT": 4}
    proxy.seen.clear()
    assert bytes(watched.get_many([blob])[0]) == content
    assert methods(proxy) == {"GET": 4}
    assert proxy.n_at_once > 1


@pytest.mark.slow
def test_many_blobs_go_at_once_but_not_more_than_connections(
    bucket: str, proxy: FaultyProxy
) -> None:
    blobs = open_s3(proxy.url, n_connections=4)
    contents = {blob_of(i, c := pattern(100, i)): c for i in range(40)}
    blobs.put_many([(blob, parts(content)) for blob, content in contents.items()])
    assert [bytes(view) for view in blobs.get_many([*contents])] == [*contents.values()]
    assert methods(proxy) == {"PUT": 40, "GET": 40}
    assert 1 < proxy.n_at_once <= 4
    blobs.delete_many([*contents])
    assert methods(proxy) == {"PUT": 40, "GET": 40, "POST": 1}
    blobs.close()


@pytest.mark.slow
def test_bodies_under_way_are_bounded(bucket: str, proxy: FaultyProxy) -> None:
    blobs = open_s3(proxy.url, buffer_bytes=PART_BYTES)
    content = pattern(4 * PART_BYTES)
    blob = blob_of(0, content)
    blobs.put_many([(blob, parts(content))])
    assert bytes(blobs.get_many([blob])[0]) == content
    assert proxy.n_at_once == 1
    blobs.delete_job(JOB)
    blobs.close()


# ---------------------------------------------------------------- failures


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["reset", "unheard", "slow down"])
@pytest.mark.parametrize("n_blobs", [1, 8])
def test_failures_that_pass_are_not_seen(
    watched: S3Blobs, proxy: FaultyProxy, fault: str, n_blobs: int
) -> None:
    contents = {blob_of(i, c := pattern(size, i)): c for i, size in enumerate(SIZES)}
    few = dict(itertools.islice(reversed(contents.items()), n_blobs))
    proxy.fault = every(4, fault)
    watched.put_many([(blob, parts(content)) for blob, content in few.items()])
    assert [bytes(view) for view in watched.get_many([*few])] == [*few.values()]
    watched.delete_many([*few])
    assert proxy.broken
    assert watched.used_bytes() == 0


@pytest.mark.slow
@pytest.mark.parametrize("size_bytes", [50_000, 3 * PART_BYTES])
def test_a_body_that_breaks_off_is_read_again(
    watched: S3Blobs, proxy: FaultyProxy, size_bytes: int
) -> None:
    content = pattern(size_bytes)
    blob = blob_of(0, content)
    watched.put_many([(blob, parts(content))])
    proxy.fault = every(2, "truncate", "GET")
    for _ in range(3):
        assert bytes(watched.get_many([blob])[0]) == content
    assert proxy.broken


@pytest.mark.slow
@pytest.mark.parametrize("size_bytes", [50_000, 2 * PART_BYTES])
def test_bodies_that_always_break_off_are_an_error_at_last(
    watched: S3Blobs, proxy: FaultyProxy, size_bytes: int
) -> None:
    content = pattern(size_bytes)
    blob = blob_of(0, content)
    watched.put_many([(blob, parts(content))])
    proxy.fault = every(1, "truncate", "GET")
    with pytest.raises(errors.StoreUnavailable, match="broke off"):
        watched.get_many([blob])


@pytest.mark.slow
@pytest.mark.parametrize("size_bytes", [100, 2 * PART_BYTES])
def test_a_refusal_says_what_was_refused_and_why(
    watched: S3Blobs, proxy: FaultyProxy, size_bytes: int
) -> None:
    content = pattern(size_bytes)
    blob = blob_of(0, content)
    proxy.fault = every(1, "deny")
    with pytest.raises(errors.StoreUnavailable, match="AccessDenied") as caught:
        watched.put_many([(blob, parts(content))])
    assert stem_of(blob) in str(caught.value)
    assert SECRET not in str(caught.value)
    with pytest.raises(errors.StoreUnavailable, match="AccessDenied"):
        watched.get_many([blob])


@pytest.mark.slow
def test_a_service_that_is_away_is_unavailable() -> None:
    blobs = open_s3("http://127.0.0.1:1", attempts_max=1, timeout_s=2)
    for operation in (
        lambda: blobs.get_many([f"{JOB}/a/0-1"]),
        lambda: blobs.get_many([f"{JOB}/a/0-1", f"{JOB}/a/1-1"]),
        lambda: blobs.put_many([(f"{JOB}/a/0-1", parts(b"x"))]),
        lambda: blobs.delete_job(JOB),
    ):
        with pytest.raises(errors.StoreUnavailable):
            operation()
    blobs.close()


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_not_a_missing_blob(bucket: str) -> None:
    blobs = S3Blobs(
        parse_url(f"s3://{KEY}:{SECRET}@no-such-bucket/p?endpoint_url={bucket}&region=us-east-1")
    )
    for ids in ([f"{JOB}/a/0-1"], [f"{JOB}/a/0-1", f"{JOB}/a/1-1"]):
        with pytest.raises(errors.StoreUnavailable, match="NoSuchBucket"):
            blobs.get_many(ids)
    blobs.close()


@pytest.mark.slow
@pytest.mark.parametrize("fault_at", [2, 3, 4])
def test_nothing_is_left_of_a_put_that_failed(
    watched: S3Blobs, proxy: FaultyProxy, bucket: str, fault_at: int
) -> None:
    import boto3

    contents = {blob_of(i, c := pattern(3 * PART_BYTES, i)): c for i in range(2)}
    counted = itertools.count(1)
    denied = lambda method, _: "deny" if method == "PUT" and next(counted) == fault_at else ""  # noqa: E731
    proxy.fault = denied
    with pytest.raises(errors.StoreUnavailable):
        watched.put_many([(blob, parts(content)) for blob, content in contents.items()])
    assert watched.used_bytes() == 0
    client = boto3.client(
        "s3",
        endpoint_url=bucket,
        region_name="us-east-1",
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
    )
    listed = client.list_multipart_uploads(Bucket=BUCKET, Prefix=watched.options.prefix)
    client.close()
    assert listed.get("Uploads", []) == []


@pytest.mark.slow
def test_a_job_goes_with_its_unfinished_uploads(s3: S3Blobs) -> None:
    key = f"{s3.options.prefix}/{JOB}/a/0-1"
    with s3._asked("CreateMultipartUpload", key) as client:
        client.create_multipart_upload(Bucket=BUCKET, Key=key)
        s3.delete_job(JOB)
        listed = client.list_multipart_uploads(Bucket=BUCKET, Prefix=s3.options.prefix)
    assert listed.get("Uploads", []) == []


@pytest.mark.slow
def test_a_blob_that_was_cut_behind_the_stores_back_comes_back_short(s3: S3Blobs) -> None:
    for size_bytes in (1000, 3 * PART_BYTES):
        content = pattern(size_bytes)
        blob = blob_of(0, content)
        with s3._asked("PutObject", blob) as client:
            client.put_object(**s3._at(blob), Body=content[: PART_BYTES // 2])
        short = s3.get_many([blob])[0]
        assert bytes(short) == content[: PART_BYTES // 2]


# ---------------------------------------------------------------- names and places


def test_an_id_says_its_size() -> None:
    blob = sized_id("job/attempt/3", 1234)
    assert (blob, stem_of(blob), size_of_blob(blob)) == (
        "job/attempt/3-1234",
        "job/attempt/3",
        1234,
    )
    assert size_of_blob("job/attempt/3") == 0


def test_a_url_has_the_options_and_the_configuration_the_rest() -> None:
    with dask.config.set({"wukong.s3.region": "eu-west-1", "wukong.s3.part-bytes": 123}):
        options = parse_url("s3://Bucket/a/b/?endpoint_url=http://h:1&tier_bytes=7")
        assert parse_url(options.url()) == options
    assert (options.bucket, options.prefix) == ("Bucket", "a/b")
    assert (options.region, options.part_bytes, options.tier_bytes) == ("eu-west-1", 123, 7)
    assert options.endpoint_url == "http://h:1"
    # Elsewhere, where nothing is configured, it means the same.
    assert parse_url(options.url()) == options


def test_credentials_of_a_url_are_shown_nowhere() -> None:
    options = parse_url("s3://KEY%2F1:very%2Bsecret@bucket/p")
    assert (options.access_key, options.secret_key) == ("KEY/1", "very+secret")
    assert parse_url(options.url()) == options
    assert "secret=" not in repr(options)
    assert "very" not in repr(options)
    with pytest.raises(ValueError, match="no option colour") as caught:
        parse_url("s3://KEY:very@bucket/p?colour=red")
    assert "very" not in str(caught.value)


@pytest.mark.parametrize("url", ["s3://", "s3:///p", "http://bucket/p", "s3://bucket:80/p"])
def test_a_url_without_a_bucket_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="no bucket"):
        parse_url(url)


def test_a_store_of_objects_has_no_place_for_blobs() -> None:
    with pytest.raises(ValueError, match="never become blobs"):
        open_store("memory://", blobs="s3://bucket/p")


@pytest.mark.slow
def test_blobs_lie_by_size_with_the_jobs_or_in_s3(bucket: str, tmp_path: Path) -> None:
    query = f"endpoint_url={bucket}&region=us-east-1&tier_bytes=1000"
    place = f"s3://{KEY}:{SECRET}@{BUCKET}/tiers?{query}"
    store = open_store(f"local://{tmp_path}/store", blobs=place)
    assert isinstance(store.blobs, TieredBlobs)
    contents = {blob_of(i, c := pattern(size)): c for i, size in enumerate((999, 1000))}
    store.blobs.put_many([(blob, parts(content)) for blob, content in contents.items()])
    small, large = contents
    assert store.blobs.small.list(JOB) == [small]
    assert store.blobs.large.list(JOB) == [large]
    assert [bytes(view) for view in store.blobs.get_many([large, small])] == [
        contents[large],
        contents[small],
    ]
    store.blobs.delete_job(JOB)
    assert store.blobs.used_bytes() == 0
    store.jobs.close()
    store.blobs.close()


# ---------------------------------------------------------------- clusters


def grow(n: int, *values: bytes) -> bytes:
    return bytes(n) + b"".join(value[:1] for value in values)


@pytest.mark.slow
def test_executors_that_are_processes_share_blobs_in_s3(proxy: FaultyProxy) -> None:
    """Local jobs, blobs in S3: every fifth request fails in some way, and nobody sees it."""
    faults = itertools.cycle(["reset", "truncate", "unheard"])
    counted = itertools.count(1)
    proxy.fault = lambda method, path: next(faults) if next(counted) % 5 == 0 else ""
    place = f"s3://{KEY}:{SECRET}@{BUCKET}/cluster?endpoint_url={proxy.url}&region=us-east-1"
    n_bytes = 200_000
    graph = {("leaf", i): (grow, n_bytes) for i in range(8)}
    for i in range(8):
        graph["mix", i] = (grow, n_bytes, *[("leaf", (i + k) % 8) for k in range(3)])
    graph["end"] = (grow, 1, *[("mix", i) for i in range(8)])
    with (
        dask.config.set({"wukong.executor.strands": False}),
        wukong.LocalCluster(2, blobs=f"{place}&tier_bytes=1000", timeout_s=120) as cluster,
    ):
        assert cluster.get(graph, "end") == bytes(9)
        assert isinstance(cluster._store.blobs, TieredBlobs)
        assert [path for method, path in proxy.seen if method == "PUT"]
        assert proxy.broken
        proxy.start_again()
        # What is small does not touch S3 at all, its end included.
        assert cluster.get({"x": (grow, 10)}, "x") == bytes(10)
        cluster.jobs()
        assert proxy.seen == []
        assert cluster._store.blobs.used_bytes() == 0


def test_threads_need_no_place_for_blobs() -> None:
    with pytest.raises(ValueError, match="leave `blobs` out"):
        wukong.LocalCluster(1, processes=False, blobs="s3://bucket/p")

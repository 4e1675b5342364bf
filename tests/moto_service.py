"""Moto's server, in a process of its own: Amazon's services on this machine, without Amazon.

`start_moto` starts one; the fixture `moto_url` (conftest) shares one among all tests of a run.
"""

import contextlib
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest

STARTS_WITHIN_S = 60.0
KEY, SECRET = "test-key", "test-secret"
"""Credentials, which moto takes without looking."""


def needs(*packages: str) -> None:
    """Skip a test whose packages are missing; in CI they may not be."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing and os.environ.get("CI") != "true":
        pytest.skip(f"not installed: {', '.join(missing)}")
    assert not missing, f"CI needs {missing}"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def start_moto() -> Iterator[str]:
    """The URL of a fresh server, which ends with the block."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1"]
    # Parts of any size, so that tests of multipart uploads need no megabytes.
    env = {**os.environ, "S3_UPLOAD_PART_MIN_SIZE": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([*command, "-p", str(port)], env=env, **quiet) as server:
        try:
            deadline = time.monotonic() + STARTS_WITHIN_S
            while True:
                try:
                    urllib.request.urlopen(f"{url}/moto-api/", timeout=5).close()
                    break
                except (urllib.error.URLError, OSError):
                    assert server.poll() is None, "moto's server has ended"
                    assert time.monotonic() < deadline, "moto's server does not answer"
                    time.sleep(0.05)
            yield url
        finally:
            server.kill()


def make_bucket(url: str, name: str) -> None:
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id=KEY,
        aws_secret_access_key=SECRET,
    )
    client.create_bucket(Bucket=name)
    client.close()

"""`wukong scheduler`: executors of this machine, served to `distributed.Client`s elsewhere."""

from __future__ import annotations

import signal
import threading
from typing import Any

import click

from wukong.cluster import LocalCluster
from wukong.errors import WukongError

LOOK_S = 0.5
"""How often it is looked whether a client has shut the server down."""


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Interface to listen on.")
@click.option("--port", default=8786, show_default=True, help="0 chooses a free one.")
@click.option(
    "--store",
    default="local://",
    show_default=True,
    help="Where jobs and values lie: local://, local:///a/folder, redis://host:port, ...",
)
@click.option("--blobs", help="Where large values lie instead: s3://bucket/prefix.")
@click.option("--n-workers", type=click.IntRange(1), help="Executors; as many as cores by default.")
@click.option("--tls-ca-file", type=click.Path(exists=True), help="Who signs the certificates.")
@click.option("--tls-cert", type=click.Path(exists=True), help="The server's certificate.")
@click.option("--tls-key", type=click.Path(exists=True), help="Its private key.")
def scheduler(
    host: str,
    port: int,
    store: str,
    blobs: str | None,
    n_workers: int | None,
    tls_ca_file: str | None,
    tls_cert: str | None,
    tls_key: str | None,
) -> None:
    """Serve distributed.Client("tcp://HOST:PORT") until interrupted, or shut down by a client.

    Whoever reaches the port can run code here: without TLS it listens on this machine only.
    """
    security = _security(tls_ca_file, tls_cert, tls_key)
    if security is None and host not in ("127.0.0.1", "localhost", "::1"):
        raise click.UsageError(
            f"to listen on {host}, give --tls-ca-file, --tls-cert and --tls-key: "
            "whoever reaches the port can run code on this machine"
        )
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        with _cluster(store, blobs, n_workers) as cluster:
            protocol = "tcp" if security is None else "tls"
            address = cluster.serve(f"{protocol}://{host}:{port}", security)
            click.echo(f"serving at {address} with {cluster.n_workers} executors")
            click.echo(f"counters at {cluster.dashboard_link}")
            while cluster.is_serving and not ended.wait(LOOK_S):
                pass
    except (WukongError, OSError, ImportError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo("ended")


def _cluster(store: str, blobs: str | None, n_workers: int | None) -> LocalCluster:
    scheme, _, place = store.partition("://")
    if scheme != "local":
        return LocalCluster(n_workers, store=store, blobs=blobs)
    return LocalCluster(n_workers, directory=place or None, blobs=blobs)


def _security(ca_file: str | None, certificate: str | None, key: str | None) -> Any:
    """What distributed takes for TLS; None without certificates."""
    given = [one is not None for one in (ca_file, certificate, key)]
    if not any(given):
        return None
    if not all(given):
        raise click.UsageError("give all of --tls-ca-file, --tls-cert and --tls-key, or none")
    from distributed import Security

    return Security(
        tls_ca_file=ca_file,
        tls_scheduler_cert=certificate,
        tls_scheduler_key=key,
        tls_worker_cert=certificate,
        tls_worker_key=key,
        tls_client_cert=certificate,
        tls_client_key=key,
        require_encryption=True,
    )

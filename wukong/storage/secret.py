"""The deployment's secret: from it derive the keys of all jobs in stores on other machines.

Clients and executors of one deployment share it; it is in no store and in no payload.
"""

from __future__ import annotations

import os
from pathlib import Path

from wukong import config
from wukong.errors import SecurityError
from wukong.storage.local_files import secret_of

MIN_SECRET_BYTES = 16


def deployment_secret() -> bytes:
    """`wukong.store.secret` of the configuration, or else this user's own.

    The configuration has it in hexadecimal; as an environment variable it is
    `DASK_WUKONG__STORE__SECRET`. A user's own is a file of mode 0600, in the folder
    `wukong.store.secret-folder`, or `~/.config/wukong`; the first one to ask makes it.

    Raises:
        SecurityError: it is too short, or no hexadecimal number; or others could read the file.
    """
    given = config.get("store.secret")
    if given is not None:
        try:
            secret = bytes.fromhex(str(given))
        except ValueError:
            secret = b""
        if len(secret) < MIN_SECRET_BYTES:
            raise SecurityError(
                f"wukong.store.secret has at least {MIN_SECRET_BYTES} bytes, in hexadecimal"
            )
        return secret
    folder = config.get("store.secret-folder")
    if folder is None:
        folder = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "wukong"
    directory = Path(folder)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return secret_of(directory)

"""The function's package: Wukong and the packages it needs, as one reproducible zip file.

Two builds from the same versions are the same bytes, so that a deployment without changes is none.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from wukong.aws.limits import UNZIPPED_MAX_BYTES
from wukong.errors import DeploymentError

NEEDED = ("dask", "cloudpickle", "numpy", "redis", "hiredis", "boto3", "aiobotocore")
"""What executors import, beside Wukong itself. Their dependencies come with them."""
GLIBC_MINORS = (34, 31, 28, 27, 26, 24, 17)
"""Wheels for these versions of glibc run on Amazon Linux 2023, which has 2.34."""
MACHINES = {"x86_64": "x86_64", "arm64": "aarch64"}
TESTS_LEFT_OUT = ("numpy", "pandas", "scipy", "sklearn")
"""Packages that carry their own tests: a third of their size."""
EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time of all files: the earliest that a zip file knows."""
LARGEST_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Package:
    """A package on disk."""

    path: Path
    digest: str
    """SHA-256, in hexadecimal."""
    zipped_bytes: int
    unzipped_bytes: int
    requirements: tuple[str, ...]
    """What was asked for."""

    @property
    def key(self) -> str:
        """Its name in the bucket; other contents have another one."""
        return f"code/{self.digest}.zip"


def default_requirements(extra: Sequence[str] = ()) -> tuple[str, ...]:
    """What is needed, and what that needs, in the versions of this environment.

    Args:
        extra: names of further packages that tasks import.
    Raises:
        DeploymentError: one of them is not installed here.
    """
    from packaging.requirements import Requirement

    found: dict[str, str] = {}
    asked = [(name, frozenset[str]()) for name in (*NEEDED, *extra)]
    while asked:
        name, extras = asked.pop()
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            if name in extra:
                raise DeploymentError(f"{name} is not installed, and has no version") from None
            continue  # what is not here is not used here
        key = package.metadata["Name"].lower().replace("_", "-")
        if key in found and not extras:
            continue
        found[key] = package.version
        for text in package.requires or ():
            requirement = Requirement(text)
            marker = requirement.marker
            environments = [{"extra": name} for name in (extras or {""})]
            if marker is None or any(marker.evaluate(chosen) for chosen in environments):
                asked.append((requirement.name, frozenset(requirement.extras)))
    return tuple(f"{name}=={found[name]}" for name in sorted(found))


def build_package(
    path: Path,
    requirements: Sequence[str],
    *,
    requirements_file: Path | None = None,
    python: str = f"{sys.version_info.major}.{sys.version_info.minor}",
    architecture: str = "x86_64",
) -> Package:
    """Build a package.

    Args:
        path: of the zip file.
        requirements: in pip's words; all that is needed, unless there is a file.
        requirements_file: the user's own, in addition; pip chooses what it needs.
        python: the function's version.
        architecture: x86_64 or arm64.
    Raises:
        DeploymentError: pip cannot bring the packages together, or they are too large for Lambda.
    Cost: pip's downloads; some ten seconds for a hundred megabytes.
    """
    with tempfile.TemporaryDirectory(prefix="wukong-package-") as folder:
        root = Path(folder)
        _install(root, requirements, requirements_file, python, architecture)
        files = dict(_files(root))
        own = Path(__file__).resolve().parents[1]
        files.update((f"wukong/{name}", found) for name, found in _files(own))
        n_bytes = sum(found.stat().st_size for found in files.values())
        if n_bytes > UNZIPPED_MAX_BYTES:
            raise DeploymentError(_too_large(files, n_bytes))
        _zip(path, files)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Package(path, digest, path.stat().st_size, n_bytes, tuple(requirements))


def _install(
    root: Path,
    requirements: Sequence[str],
    requirements_file: Path | None,
    python: str,
    architecture: str,
) -> None:
    machine = MACHINES[architecture]
    platforms = [f"manylinux_2_{minor}_{machine}" for minor in GLIBC_MINORS]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile"]
    command += ["--disable-pip-version-check", "--no-warn-conflicts", "--target", str(root)]
    command += ["--implementation", "cp", "--python-version", python, "--only-binary", ":all:"]
    for tag in (*platforms, f"manylinux2014_{machine}"):
        command += ["--platform", tag]
    if requirements_file is not None:
        command += ["--requirement", str(requirements_file)]
    else:
        command += ["--no-deps"]  # they are all named, and nothing is left to choose
    done = subprocess.run(
        [*command, *requirements], capture_output=True, text=True, check=False, env=_environment()
    )
    if done.returncode:
        raise DeploymentError(f"pip cannot build the package:\n{done.stderr.strip()}")


def _environment() -> dict[str, str]:
    """pip's: without what would let it see this environment's packages."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PIP_TARGET")}


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    """Files that belong into the package, by their names in it."""
    for found in sorted(root.rglob("*")):
        parts = found.relative_to(root).parts
        if not found.is_file() or "__pycache__" in parts or parts[0] == "bin":
            continue
        if parts[0] in TESTS_LEFT_OUT and "tests" in parts[1:-1]:
            continue
        # What pip notes about its own work differs from one build to the next.
        if parts[-1] in ("RECORD", "direct_url.json", "REQUESTED"):
            continue
        yield "/".join(parts), found


def _zip(path: Path, files: dict[str, Path]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    with zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as package:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            package.writestr(entry, files[name].read_bytes())
    draft.replace(path)


def _too_large(files: dict[str, Path], n_bytes: int) -> str:
    sizes: dict[str, int] = {}
    for name, found in files.items():
        top = name.partition("/")[0]
        sizes[top] = sizes.get(top, 0) + found.stat().st_size
    largest = sorted(sizes, key=lambda top: -sizes[top])[:LARGEST_SHOWN]
    shown = ", ".join(f"{top} {sizes[top] / 1e6:.0f} MB" for top in largest)
    return (
        f"the package has {n_bytes / 1e6:.0f} MB, and Lambda takes {UNZIPPED_MAX_BYTES / 1e6:.0f} "
        f"MB; the largest are {shown}. Leave out what tasks do not import"
    )

"""What the local Lambda service knows of a function: its code, its limits, how it is started."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from wukong.aws.limits import MEMORY_PER_CORE_MB, TIMEOUT_MAX_S
from wukong.aws.platform import Scaling

ACCOUNT = "000000000000"
REGION = "us-east-1"
HANDLER = "wukong.executor.aws_lambda.handler"
RUNTIME_PACKAGES = ("awslambdaric", "simplejson", "snapshot-restore-py")
"""What the cloud's images have beside Python itself."""

# Runs in the new process, before anything of the function: it dies with the service, and its
# memory is bounded. RLIMIT_DATA counts what the process has allocated for itself; what it maps of
# files that others share is not counted.
BOOT = """
import ctypes, os, resource, runpy, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit()
n_bytes = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, n_bytes))
sys.argv = ["awslambdaric", sys.argv[3]]
runpy.run_module("awslambdaric", run_name="__main__")
"""


@dataclass(frozen=True, slots=True)
class LocalFunction:
    """A function of the local service."""

    name: str
    handler: str = HANDLER
    code: Path | None = None
    """A folder, or a zip package; None: what this process itself can import."""
    python: str = sys.executable
    """The interpreter; of the same minor version as the one that has awslambdaric."""
    environment: Mapping[str, str] = field(default_factory=dict)
    memory_mb: int = MEMORY_PER_CORE_MB
    timeout_s: float = float(TIMEOUT_MAX_S)
    scaling: Scaling = field(default_factory=Scaling)
    on_failure: str | None = None
    """Another function of the service, which gets the events that were given up."""

    @property
    def arn(self) -> str:
        """Its name in the cloud's form."""
        return f"arn:aws:lambda:{REGION}:{ACCOUNT}:function:{self.name}"

    def to_configuration(self) -> dict[str, object]:
        """What GetFunctionConfiguration answers."""
        return {
            "FunctionName": self.name,
            "FunctionArn": self.arn,
            "Runtime": f"python{sys.version_info.major}.{sys.version_info.minor}",
            "Handler": self.handler,
            "MemorySize": self.memory_mb,
            "Timeout": int(self.timeout_s),
            "Version": "$LATEST",
            "PackageType": "Zip",
            "State": "Active",
            "LastUpdateStatus": "Successful",
            "Architectures": ["arm64" if os.uname().machine == "aarch64" else "x86_64"],
            "Environment": {"Variables": dict(self.environment)},
        }

    def unpack(self, directory: Path) -> Path | None:
        """Where its code lies; a zip package is unpacked below the directory, once."""
        if self.code is None or self.code.is_dir():
            return self.code
        digest = hashlib.sha256(self.code.read_bytes()).hexdigest()[:16]
        root = directory / "code" / f"{self.name}-{digest}"
        if not root.is_dir():
            draft = root.with_suffix(f".{os.getpid()}")
            with zipfile.ZipFile(self.code) as package:
                package.extractall(draft)
            draft.rename(root)
        return root

    def command(self) -> list[str]:
        """The command line of one environment."""
        n_bytes = self.memory_mb * 1024 * 1024
        return [self.python, "-c", BOOT, str(os.getpid()), str(n_bytes), self.handler]

    def variables(self, root: Path | None, runtime: Path, url: str, name: str) -> dict[str, str]:
        """The environment variables of one environment, as the cloud sets them.

        Args:
            root: where the code lies; None: wherever this process finds it.
            runtime: a folder with the runtime client.
            url: of the service, where executors invoke each other.
            name: of the environment, for its log.
        """
        path = [str(runtime)] if root else [entry for entry in sys.path if entry]
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        inherited = {key: os.environ[key] for key in INHERITED if key in os.environ}
        return {
            **inherited,
            "PATH": os.environ.get("PATH", os.defpath),
            "PYTHONPATH": os.pathsep.join([str(root), *path] if root else path),
            "LANG": "en_US.UTF-8",
            "TZ": ":UTC",
            "_HANDLER": self.handler,
            "LAMBDA_TASK_ROOT": str(root or os.getcwd()),
            "AWS_EXECUTION_ENV": f"AWS_Lambda_python{version}",
            "AWS_LAMBDA_INITIALIZATION_TYPE": "on-demand",
            "AWS_LAMBDA_FUNCTION_NAME": self.name,
            "AWS_LAMBDA_FUNCTION_VERSION": "$LATEST",
            "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": str(self.memory_mb),
            "AWS_LAMBDA_LOG_GROUP_NAME": f"/aws/lambda/{self.name}",
            "AWS_LAMBDA_LOG_STREAM_NAME": name,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ACCESS_KEY_ID": os.environ.get("AWS_ACCESS_KEY_ID", "local"),
            "AWS_SECRET_ACCESS_KEY": os.environ.get("AWS_SECRET_ACCESS_KEY", "local"),
            "AWS_ENDPOINT_URL_LAMBDA": url,
            **self.environment,
        }


# Beside these nothing of the service's own environment reaches a function, as in the cloud.
INHERITED = ("HOME", "USER", "COVERAGE_PROCESS_START", "WUKONG_TEST_RUN", "PYTHONHASHSEED")


def runtime_folder(directory: Path) -> Path:
    """A folder with links to the runtime client alone, for functions that bring all the rest.

    Raises:
        ImportError: awslambdaric is missing; the message says how to install it.
    """
    folder = directory / "runtime"
    folder.mkdir(parents=True, exist_ok=True)
    for package in RUNTIME_PACKAGES:
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            if package != "awslambdaric":
                continue
            raise ImportError(
                "the local Lambda service needs the runtime client: pip install 'wukong[lambda]'"
            ) from None
        for top in sorted({file.parts[0] for file in files if file.parts[0] != ".."}):
            source = Path(str(importlib.metadata.distribution(package).locate_file(top)))
            target = folder / top
            if not target.exists() and not top.startswith("__pycache__"):
                target.symlink_to(source)
    return folder

"""What tests need that may be missing: skipped on a user's machine, required in CI."""

import importlib.util
import os

import pytest


def needs(*packages: str) -> None:
    """Skip the calling module when a package is missing; with CI=true that is a failure."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if not missing:
        return
    if os.environ.get("CI"):
        raise ImportError(f"needed in CI: {', '.join(missing)}")
    pytest.skip(f"not installed: {', '.join(missing)}", allow_module_level=True)

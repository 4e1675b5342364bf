"""Defaults and the user's settings: `wukong.yaml`, registered with `dask.config`."""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path
from typing import Any

import dask.config
import yaml


def register() -> None:
    """Make Wukong's defaults part of `dask.config`; the user's own values win."""
    text = importlib.resources.files("wukong").joinpath("wukong.yaml").read_text()
    defaults = yaml.safe_load(text)
    dask.config.update_defaults(defaults)
    # Frames of this package say nothing to the reader of a task's traceback, as Dask's do not.
    shortened = dask.config.get("admin.traceback.shorten")
    own = f"^{re.escape(str(Path(__file__).parent))}"
    dask.config.update_defaults({"admin": {"traceback": {"shorten": [*shortened, own]}}})


def get(name: str) -> Any:
    """The value of one setting, as `"executor.split"`."""
    return dask.config.get(f"wukong.{name}")

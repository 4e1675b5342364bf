"""Defaults and the user's settings: `wukong.yaml`, registered with `dask.config`."""

from __future__ import annotations

import importlib.resources
from typing import Any

import dask.config
import yaml


def register() -> None:
    """Make Wukong's defaults part of `dask.config`; the user's own values win."""
    text = importlib.resources.files("wukong").joinpath("wukong.yaml").read_text()
    defaults = yaml.safe_load(text)
    dask.config.update_defaults(defaults)


def get(name: str) -> Any:
    """The value of one setting, as `"executor.split"`."""
    return dask.config.get(f"wukong.{name}")

"""Where Wukong's server differs from distributed's scheduler, and why.

docs/dask.md has a table of the same rows; `test_client_exceptions.py` holds the two together.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True, slots=True)
class Difference:
    """One accepted difference."""

    what: str
    """The behaviour, as a user would call it."""
    here: str
    """What Wukong does instead."""
    why: str
    tests: tuple[str, ...]
    """Names (patterns) of the tests that do not hold here."""
    backends: str = "wukong-*"
    """Pattern of the backends that differ."""


DIFFERENCES: tuple[Difference, ...] = ()


def reason_of(test: str, backend: str) -> str | None:
    """Why this test need not hold with this backend, or None."""
    for difference in DIFFERENCES:
        if fnmatchcase(backend, difference.backends):
            for pattern in difference.tests:
                if fnmatchcase(test, pattern):
                    return f"{difference.what}: {difference.here}"
    return None

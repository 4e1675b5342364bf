"""The accepted differences are tests that exist, and rows of docs/dask.md."""

from __future__ import annotations

import ast
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.dask.accepted import DIFFERENCES, Difference

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "dask.md"


def names_of_tests() -> set[str]:
    return {
        node.name
        for path in HERE.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
    }


def rows_of_document() -> set[tuple[str, str, str]]:
    """The rows of the table below the heading "Accepted differences"."""
    _, _, rest = DOCUMENT.read_text(encoding="utf-8").partition("## Accepted differences\n")
    table = rest.partition("\n## ")[0]
    rows = [
        tuple(cell.strip() for cell in line.strip().strip("|").split(" | "))
        for line in table.splitlines()
        if line.startswith("|") and not re.match(r"^\|[\s|:-]+\|$", line)
    ]
    assert all(len(row) == 3 for row in rows), "each row has three cells"
    return set(rows[1:])  # type: ignore[arg-type]


@pytest.mark.parametrize("difference", DIFFERENCES, ids=lambda d: d.what)
def test_a_difference_names_tests_that_exist(difference: Difference) -> None:
    names = names_of_tests()
    for pattern in difference.tests:
        assert any(fnmatchcase(name, pattern) for name in names), pattern


def test_the_document_has_the_same_rows() -> None:
    assert rows_of_document() == {(d.what, d.here, d.why) for d in DIFFERENCES}

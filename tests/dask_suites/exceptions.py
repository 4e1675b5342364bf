"""What is left out of the comparison, and which differences are accepted, each with its reason."""

LEFT_OUT = {
    "dask/tests/test_distributed.py": "runs on distributed's own scheduler",
    "dask/dataframe/dask_expr/tests/test_distributed.py": "runs on distributed's own scheduler",
}
"""Files, under site-packages."""

EXCEPTIONS: dict[str, str] = {
    "tests/test_local.py::test_ordering": (
        "asks for Dask's own order of tasks that do not depend on each other"
    ),
}
"""End of a test's id -> why its outcome may differ."""

"""What is left out of the comparison, and which differences are accepted, each with its reason."""

LEFT_OUT = {
    "dask/tests/test_distributed.py": "runs on distributed's own scheduler",
    "dask/dataframe/dask_expr/tests/test_distributed.py": "runs on distributed's own scheduler",
}
"""Files, under site-packages."""

LONG = ("test_merge_by_multiple_columns", "test_split_out_automatically", "test_concat5")
"""Tests of half a minute and more: no part of a sample."""

_SAME_IDENT = (
    "counts the threads of its own pool by their idents; Wukong's processes are forked from one, "
    "and have one ident"
)
EXCEPTIONS = {
    ("threads", "tests/test_local.py::test_ordering"): (
        "asks for Dask's own order of tasks that do not depend on each other"
    ),
    ("processes", "tests/test_multiprocessing.py::test_custom_context_used_python3_posix"): (
        "asks for a context of `multiprocessing`, which does not start Wukong's processes"
    ),
    ("processes", "test_multiprocessing.py::test_process_initializer[processes-proc_init"): (
        "asks for processes of one graph; Wukong's are kept, and prepared by `local.preload`"
    ),
    ("processes", "tests/test_threaded.py::test_pool_kwarg[ThreadPool]"): _SAME_IDENT,
    ("processes", "tests/test_threaded.py::test_pool_kwarg[ThreadPoolExecutor]"): _SAME_IDENT,
}
"""(mode, part of a test's id) -> why it need not end as with Dask's scheduler."""

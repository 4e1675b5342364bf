"""The rules of the code's style, as tests.

The map of modules and their layers stands here, in `LAYERS`; a new module is added to it. An
exception to a rule is listed by name with its reason, and must be needed: one that no longer is
fails the test too.
"""

import ast
import re
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from source_tree import (
    DASK_INTERNALS,
    EVERYTHING,
    MODULES,
    ROOT,
    TEXTS,
    WUKONG,
    code_lines,
    functions,
    imports,
    matches,
    module_of,
    name_of,
    parsed,
    protocol_methods,
    sources,
    statements,
)

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60

# From the lowest layer to the highest. A module imports from lower layers; modules that match one
# pattern are one part and may import each other.
LAYERS: list[tuple[str, ...]] = [
    ("wukong.errors", "wukong.config", "wukong.executor", "wukong.scheduler"),
    ("wukong.rdma.lease", "wukong.rdma.transport"),
    ("wukong.aws", "wukong.aws.limits", "wukong.aws.prices"),
    ("wukong.executor.messages", "wukong.scheduler.calls"),
    (
        "wukong.executor.events",
        "wukong.executor.scene",
        "wukong.scheduler.fused",
        "wukong.scheduler.plan",
    ),
    ("wukong.scheduler.graph", "wukong.scheduler.holdings", "wukong.storage.rows"),
    (
        "wukong.storage.contract",
        "wukong.storage.silence",
        "wukong.storage.values",
        "wukong.scheduler.strands",
        "wukong.scheduler.costs",
        "wukong.rdma.arena",
        "wukong.rdma.frames",
        "wukong.rdma.lease_grants",
        "wukong.rdma.queue_pairs",
        "wukong.rdma.scaling",
        "wukong.rdma.spin",
        "wukong.trace",
    ),
    (
        "wukong.executor.invoker",
        "wukong.executor.split",
        "wukong.storage.state",
        "wukong.executor.serialize*",
        "wukong.report*",
        "wukong.scheduler.parts",
        "wukong.scheduler.recovery",
        "wukong.storage.blobfiles",
    ),
    ("wukong.scheduler.piece", "wukong.storage.extension", "wukong.storage.oversight"),
    (
        "wukong.executor.work",
        "wukong.executor.ops",
        "wukong.scheduler.job",
        "wukong.storage.memory*",
        "wukong.storage.local*",
        "wukong.storage.redis*",
        "wukong.storage.s3*",
        "wukong.storage.tiered",
    ),
    ("wukong.storage.secret",),
    ("wukong.storage", "wukong.scheduler.retries", "wukong.executor.outputs"),
    ("wukong.executor.core", "wukong.executor.kept"),
    ("wukong.executor.wire",),
    ("wukong.executor.recorder", "wukong.executor.early", "wukong.rdma.ports"),
    ("wukong.executor.run", "wukong.rdma.verbs"),
    ("wukong.executor.lanes",),
    (
        "wukong.executor.pool*",
        "wukong.executor.aws_lambda*",
        "wukong.executor.futures*",
    ),
    ("wukong.rdma.*",),
    ("wukong.rdma",),
    ("wukong.sim*",),
    ("wukong.chores", "wukong.submit", "wukong.sweep"),
    ("wukong.session*",),
    ("wukong.futures",),
    ("wukong.job_driver", "wukong.callbacks", "wukong.scheduler.dask_server*"),
    ("wukong.scheduler.dask_cluster",),
    ("wukong.cluster*",),
    ("wukong.client", "wukong.aws*"),
    ("wukong.cli_scheduler", "wukong.client_dask"),
    ("wukong",),
    ("wukong.workloads",),
    ("wukong.cli",),
]

PURE = {
    "wukong.aws.prices",
    "wukong.aws.limits",
    "wukong.executor.aws_lambda_pace",
    "wukong.aws.platform",
    "wukong.errors",
    *(f"wukong.executor.{n}" for n in ("core", "events", "messages", "outputs", "split", "work")),
    *(
        f"wukong.rdma.{name}"
        for name in [
            "arena",
            "frames",
            "lease",
            "lease_grants",
            "queue_pairs",
            "spin",
            "scaling",
            "transport",
        ]
    ),
    *(f"wukong.scheduler.{name}" for name in ["calls", "holdings", "job", "recovery", "strands"]),
    *(
        f"wukong.storage.{name}"
        for name in ["contract", "extension", "oversight", "rows", "silence", "state", "values"]
    ),
}
# A pure module may name these in annotations (under TYPE_CHECKING) or take their plain data.
PLAIN_DATA = {"wukong.scheduler.graph"}
IMPURE_STDLIB = {
    "_thread",
    "asyncio",
    "concurrent",
    "datetime",
    "logging",
    "multiprocessing",
    "os",
    "random",
    "secrets",
    "select",
    "selectors",
    "signal",
    "socket",
    "subprocess",
    "threading",
    "time",
    "uuid",
}

# Third-party packages that everybody may import anywhere.
COMMON_PACKAGES = {"numpy", "dask"}
# Other core dependencies: the patterns of the files that own them, at module level or in functions.
OWNED = {
    "click": ("wukong.cli*", "wukong.*.commands"),
    "cloudpickle": ("wukong.executor.serialize*",),
    "lmdb": ("wukong.storage.local*",),
    "packaging": ("wukong.aws.package", "wukong.scheduler.dask_server*"),
    "rich": ("wukong.cli",),
    "yaml": ("wukong", "wukong.config"),
}
# Files that exist for an extra, and that others import in functions only: they import it anyhow.
WHOLE = {
    "wukong.client_dask": {"distributed"},
    "wukong.scheduler.dask_server*": {"distributed", "packaging", "tornado"},
}
# Packages of the extras: imported only inside functions of the files that own them.
OPTIONAL = {
    "IPython": ("wukong.report*",),
    "aiobotocore": ("wukong.aws*", "wukong.executor.aws_lambda*", "wukong.storage.s3*"),
    "aiohttp": ("wukong.aws.lambda_*", "wukong.storage.s3*"),
    "boto3": ("wukong.aws*", "wukong.executor.aws_lambda*", "wukong.storage.s3*"),
    "botocore": ("wukong.aws*", "wukong.executor.aws_lambda*", "wukong.storage.s3*"),
    "dask_ml": ("wukong.workloads",),
    "distributed": ("wukong.cli_scheduler", "wukong.scheduler.dask_*"),
    "ibverbs": ("wukong.rdma.verbs",),
    "matplotlib": ("wukong.report*",),
    "parsl": ("wukong.rdma.batch",),
    "pyverbs": ("wukong.rdma.verbs",),
    "msgpack": ("wukong.storage.redis*",),
    "redis": ("wukong.storage.redis*",),
    "sklearn": ("wukong.workloads",),
    "tornado": ("wukong.scheduler.dask_*",),
    "threadpoolctl": ("wukong.cli", "wukong.executor.pool*"),
}

# (file, function) -> why it may be longer than MAX_FUNCTION_LINES.
LONG_FUNCTIONS: dict[tuple[str, str], str] = {}
# file -> why it may be longer than MAX_FILE_LINES.
LONG_FILES: dict[str, str] = {}
# file -> why it may print.
PRINTING_FILES: dict[str, str] = {}

BANNED_NAMES = {"common", "data", "helper", "helpers", "info", "manager", "misc", "util", "utils"}
UNFINISHED = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b")
MACHINE_PATHS = re.compile(r"(?<![\w.}])/(?:work|home|Users)/\w")
TRACKER = re.compile(r"\bissues? #?\d+\b|\bfixes #\d+", re.IGNORECASE)


def place(module: str) -> tuple[int, str] | None:
    """The layer's number and the pattern that names the module; an exact name goes first."""
    found = [
        (pattern != module, number, pattern)
        for number, layer in enumerate(LAYERS)
        for pattern in layer
        if fnmatchcase(module, pattern)
    ]
    return min(found)[1:] if found else None


@pytest.fixture(scope="module", autouse=True)
def every_file_is_parsed() -> None:
    """Parse once, for all tests: it takes longer than any of them."""
    for path in EVERYTHING:
        parsed(path)


def report(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


def test_every_module_has_a_layer() -> None:
    report([f"{module}: not in LAYERS" for module in sorted(MODULES) if place(module) is None])


def test_a_module_imports_only_from_lower_layers() -> None:
    problems = []
    for path in WUKONG:
        own = place(module_of(path))
        for line, target, _, _ in imports(path):
            there = place(target)
            if own is None or there is None or module_of(path) == target:
                continue
            if there[0] >= own[0] and there != own:
                problems.append(
                    f"{name_of(path)}:{line}: imports {target}, which is not in a lower layer"
                )
    report(problems)


def test_a_pure_module_imports_only_pure_ones() -> None:
    problems = []
    for path in WUKONG:
        if module_of(path) not in PURE:
            continue
        for line, target, _, typing_only in imports(path):
            top = target.partition(".")[0]
            if top == "wukong":
                allowed = target in PURE | PLAIN_DATA or typing_only
            elif top in sys.stdlib_module_names:
                allowed = top not in IMPURE_STDLIB
            else:
                allowed = top == "numpy"
            if not allowed:
                problems.append(f"{name_of(path)}:{line}: a pure module imports {target}")
    report(problems)


def test_third_party_packages_are_imported_by_their_owners() -> None:
    problems = []
    for path in WUKONG:
        module = module_of(path)
        for line, target, in_function, typing_only in imports(path):
            top = target.partition(".")[0]
            where = f"{name_of(path)}:{line}: {target}"
            if top == "wukong" or top in sys.stdlib_module_names or top in COMMON_PACKAGES:
                continue
            if any(top in owned and fnmatchcase(module, files) for files, owned in WHOLE.items()):
                continue
            if top in OWNED:
                if not matches(module, OWNED[top]):
                    problems.append(f"{where} belongs to {', '.join(OWNED[top])}")
            elif top in OPTIONAL:
                if not matches(module, OPTIONAL[top]):
                    problems.append(f"{where} belongs to {', '.join(OPTIONAL[top])}")
                elif not in_function and not typing_only:
                    problems.append(f"{where} is optional: import it inside a function")
            else:
                problems.append(f"{where} is not a dependency")
    report(problems)


def test_only_the_graph_modules_know_dask_internals() -> None:
    # Of plans, and of what distributed's own shuffles put into a graph.
    known = ("wukong.scheduler.graph", "wukong.scheduler.dask_server_shuffles")
    report(
        [
            f"{name_of(path)}:{line}: imports {target}"
            for path in WUKONG
            if module_of(path) not in known
            for line, target, _, _ in imports(path)
            if matches(target, DASK_INTERNALS)
        ]
    )


def test_the_package_imports_neither_bench_nor_tests() -> None:
    report(
        [
            f"{name_of(path)}:{line}: imports {target}"
            for path in WUKONG
            for line, target, _, _ in imports(path)
            if target.partition(".")[0] in ("bench", "tests")
        ]
    )


def test_imports_are_absolute() -> None:
    def walk(node: ast.AST) -> Iterator[ast.AST]:
        yield node
        for child in statements(node):
            yield from walk(child)

    report(
        [
            f"{name_of(path)}:{node.lineno}: relative import"
            for path in EVERYTHING
            for node in walk(parsed(path))
            if isinstance(node, ast.ImportFrom) and node.level > 0
        ]
    )


def test_files_are_short() -> None:
    long = {
        name_of(path): lines
        for path in EVERYTHING
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_FILE_LINES
    }
    report([f"{name}: {lines} lines" for name, lines in long.items() if name not in LONG_FILES])
    report([f"{name}: a needless exception" for name in LONG_FILES if name not in long])


def test_functions_are_short() -> None:
    long = {
        (name_of(path), name): lines
        for path in EVERYTHING
        for name, function in functions(path)
        if (lines := code_lines(function)) > MAX_FUNCTION_LINES
    }
    report(
        [f"{where}: {lines} lines" for where, lines in long.items() if where not in LONG_FUNCTIONS]
    )
    report([f"{where}: a needless exception" for where in LONG_FUNCTIONS if where not in long])


def test_modules_are_named_after_what_they_hold() -> None:
    report(
        [
            f"{name_of(path)}: says nothing about its contents"
            for path in EVERYTHING
            if BANNED_NAMES & set(path.relative_to(ROOT).with_suffix("").parts)
        ]
    )


def test_every_public_name_has_a_docstring() -> None:
    problems = []
    for path in WUKONG + sources("bench"):
        tree = parsed(path)
        if tree.body and ast.get_docstring(tree) is None:
            problems.append(f"{name_of(path)}: no docstring")
        public: list[tuple[str, ast.AST]] = []
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                public.append((node.name, node))
            # A class with bases inherits its methods' contracts together with their texts, and
            # what a protocol has explained is not explained again.
            if isinstance(node, ast.ClassDef) and not node.bases and not node.name.startswith("_"):
                public += [
                    (item.name, item)
                    for item in node.body
                    if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)
                    if item.name not in protocol_methods()
                ]
        problems += [
            f"{name_of(path)}:{node.lineno}: {name} has no docstring"
            for name, node in public
            if not name.startswith("_") and not ast.get_docstring(node)
        ]
    report(problems)


def test_only_the_command_line_prints() -> None:
    printing = {
        f"{name_of(path)}:{node.lineno}": name_of(path)
        for path in WUKONG
        if module_of(path) != "wukong.cli"
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    }
    report([f"{place}: prints" for place, name in printing.items() if name not in PRINTING_FILES])


@pytest.mark.parametrize(
    ("rule", "pattern"),
    [("unfinished", UNFINISHED), ("a machine's own path", MACHINE_PATHS), ("a tracker", TRACKER)],
    ids=["unfinished", "machine-paths", "tracker"],
)
def test_no_text_says_what_only_its_writer_knows(rule: str, pattern: re.Pattern[str]) -> None:
    report(
        [
            f"{name_of(path)}:{number}: {rule}: {line.strip()}"
            for path in EVERYTHING + TEXTS
            if path != Path(__file__).resolve()
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if pattern.search(line)
        ]
    )

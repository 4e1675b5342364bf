"""The sources of this repository, parsed: files, modules, imports, functions."""

import ast
import gc
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DASK_INTERNALS = ("dask._*", "dask.core", "dask.order", "dask.optimization", "dask.highlevelgraph")


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    """The file's path from the root, with slashes."""
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def parsed(path: Path) -> ast.Module:
    # What the collector calls may change the depth that Python 3.11 counts while it makes a tree.
    gc.disable()
    try:
        return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    finally:
        gc.enable()


WUKONG = sources("wukong")
MODULES = {module_of(path) for path in WUKONG}
EVERYTHING = sources("wukong", "bench", "tests")
TEXTS = sorted(
    path
    for pattern in (
        "*.md",
        "*.toml",
        "Makefile",
        "docs/**/*.md",
        "wukong/**/*.yaml",
        "wukong/**/*.lua",
    )
    for path in ROOT.glob(pattern)
)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the statements right below the node; expressions, which are most nodes, hold none."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr | ast.expr_context):
            yield child


@cache
def imports(path: Path) -> list[tuple[int, str, bool, bool]]:
    """(line, module, in a function, for annotations only) of every absolute import."""

    def walk(
        node: ast.AST, in_function: bool, typing_only: bool
    ) -> Iterator[tuple[int, str, bool, bool]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, in_function, typing_only
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                # `from package import module` imports the module; any other name is the package's.
                known = whole in MODULES or matches(whole, DASK_INTERNALS)
                yield node.lineno, whole if known else node.module, in_function, typing_only
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in statements(node):
            yield from walk(child, inside, typing_only or is_type_checking(node))

    return list(walk(parsed(path), False, False))


def matches(module: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(module, pattern) for pattern in patterns)


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield every function with its dotted name inside the file."""

    def walk(
        node: ast.AST, prefix: str
    ) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in statements(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield prefix + child.name, child
                yield from walk(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, f"{prefix}{child.name}.")
            else:
                yield from walk(child, prefix)

    yield from walk(parsed(path), "")


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, the docstring not counted."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None and first.end_lineno is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


@cache
def protocol_methods() -> set[str]:
    """Names of the methods that some protocol of the package declares with a docstring."""
    return {
        item.name
        for path in WUKONG
        for node in parsed(path).body
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(base).startswith("Protocol") for base in node.bases)
        for item in node.body
        if isinstance(item, ast.FunctionDef) and ast.get_docstring(item)
    }

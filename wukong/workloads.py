"""The six workloads of the paper as ordinary Dask collections, with their checks.

`wukong demo` runs them at small sizes and `bench` at full ones. A workload knows nothing of
schedulers: it builds collections, and compares what a scheduler made of them with numpy's or
scikit-learn's answer.

Source: Carver et al., SoCC '20, section 5 (TR, GEMM, SVD1, SVD2, TSQR, SVC).
"""

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import dask
import dask.array as da
import numpy as np
from dask.typing import Key
from numpy.typing import NDArray

from wukong.errors import WukongError

Floats: TypeAlias = NDArray[np.float64]
Graph: TypeAlias = Mapping[Key, object]


class MissingExtra(WukongError, ImportError):
    """A package that only an extra brings is not installed; the message names the extra."""


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison of a result with its reference."""

    what: str
    """What was compared, in a few words."""
    error: float
    """The largest deviation found, relative to the largest value, or a count of wrong values."""
    tolerance: float
    """The largest deviation that counts as right."""

    @property
    def passed(self) -> bool:
        """Whether the result is right; a deviation that is no number is not."""
        return self.error <= self.tolerance


@dataclass(frozen=True, slots=True)
class Problem:
    """A workload at one size: collections to compute and the test of their values."""

    collections: tuple[object, ...]
    """Dask collections, computed together."""
    size_bytes: int
    """Size of the input, in bytes."""
    check: Callable[[Sequence[object]], list[Check]]
    """Compares the collections' values, in the same order, with the reference."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One of the six, buildable at the sizes of the demo and of the benchmark."""

    name: str
    """Short name, as in the paper."""
    title: str
    """What it computes, for a table."""
    build: Callable[[bool], Problem]
    """Takes whether full size is wanted; the graph is built anew at each call."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """An optimised graph, ready for any scheduler's `get(graph, keys)`."""

    graph: Graph
    """The merged low-level graph, already optimised."""
    keys: list[Key]
    """Keys of each collection, in order, nested as the collection's blocks are."""
    finish: Callable[[Sequence[object]], list[object]]
    """Makes the collections' values of what `get` returned."""


def prepare(problem: Problem) -> Prepared:
    """Optimise the problem's collections, so that only `get` is left to be timed."""
    optimised = dask.optimize(*problem.collections)
    graph: dict[Key, object] = {}
    for collection in optimised:
        graph.update(collection.__dask_graph__())

    def finish(blocks: Sequence[object]) -> list[object]:
        values = []
        for collection, block in zip(optimised, blocks):
            finalize, extra = collection.__dask_postcompute__()
            values.append(finalize(block, *extra))
        return values

    return Prepared(graph, [collection.__dask_keys__() for collection in optimised], finish)


def tree_reduction(full: bool) -> Problem:
    """The sum of a vector, two partial sums at a time."""
    n, n_chunks = (256_000_000, 1_024) if full else (16_000_000, 256)
    x = da.random.default_rng(0).random(n, chunks=n // n_chunks)

    @cache
    def expected() -> float:
        return math.fsum(float(np.sum(block)) for block in _blocks(x))

    def check(values: Sequence[object]) -> list[Check]:
        error = abs(float(np.asarray(values[0])) / expected() - 1)
        return [Check("sum", error, 1e-11)]

    return Problem((x.sum(split_every=2),), int(x.nbytes), check)


def matrix_product(full: bool) -> Problem:
    """The product of two square matrices."""
    n, chunk = (8_192, 2_048) if full else (2_048, 512)
    rng = da.random.default_rng(1)
    x = rng.random((n, n), chunks=chunk)
    y = rng.random((n, n), chunks=chunk)

    @cache
    def expected() -> tuple[Floats, Floats]:
        # Freivalds: a product with one vector finds a wrong entry, at the cost of n^2.
        probe = np.random.default_rng(2).random(n)
        right = y.compute(scheduler="sync") @ probe
        return probe, x.compute(scheduler="sync") @ right

    def check(values: Sequence[object]) -> list[Check]:
        probe, product = expected()
        error = _relative(np.asarray(values[0]) @ probe, product)
        return [Check("product with a vector", error, 1e-10)]

    return Problem((x @ y,), int(x.nbytes + y.nbytes), check)


def tall_skinny_svd(full: bool) -> Problem:
    """Singular values and right singular vectors of a tall-and-skinny matrix."""
    x = _tall_skinny(full)
    _, s, v = da.linalg.svd(x)

    gram = cache(lambda: _gram(x))

    def check(values: Sequence[object]) -> list[Check]:
        found_s, found_v = np.asarray(values[0]), np.asarray(values[1])
        # By the Gram matrix: numpy's SVD of 1 GB would take longer than the job.
        expected = np.sqrt(np.linalg.eigvalsh(gram())[::-1])
        diagonal = found_v @ gram() @ found_v.T
        return [
            Check("singular values", _relative(found_s, expected), 1e-9),
            Check("V diagonalises A'A", _relative(diagonal, np.diag(expected**2)), 1e-9),
        ]

    return Problem((s, v), int(x.nbytes), check)


def square_svd(full: bool) -> Problem:
    """The five leading singular triples of a square matrix, by random compression."""
    n, chunk = (12_000, 2_000) if full else (4_000, 1_000)
    x = da.random.default_rng(3).random((n, n), chunks=chunk)
    u, s, v = da.linalg.svd_compressed(x, k=5, seed=da.random.default_rng(4))

    largest = cache(lambda: _largest_singular_value(x))

    def check(values: Sequence[object]) -> list[Check]:
        found_u, found_s, found_v = (np.asarray(value) for value in values)
        projected = np.concatenate([found_u.T @ column for column in _column_blocks(x)], axis=1)
        return [
            Check("U'A = SV", _relative(projected, found_s[:, None] * found_v), 1e-9),
            Check("largest singular value", abs(float(found_s[0]) / largest() - 1), 2e-2),
        ]

    return Problem((u, s, v), int(x.nbytes), check)


def tall_skinny_qr(full: bool) -> Problem:
    """R of the QR factorisation of a tall-and-skinny matrix."""
    x = _tall_skinny(full)
    _, r = da.linalg.qr(x)

    gram = cache(lambda: _gram(x))

    def check(values: Sequence[object]) -> list[Check]:
        # R is the Cholesky factor of the Gram matrix, up to its rows' signs.
        expected = np.asarray(np.linalg.cholesky(gram()).T, np.float64)
        error = _relative(_positive_rows(np.asarray(values[0])), expected)
        return [Check("R", error, 1e-9)]

    return Problem((r,), int(x.nbytes), check)


def svc_prediction(full: bool) -> Problem:
    """The classes that a support vector machine predicts, block by block.

    Raises:
        MissingExtra: dask-ml or scikit-learn is not installed.
    """
    if not (importlib.util.find_spec("dask_ml") and importlib.util.find_spec("sklearn")):
        raise MissingExtra("SVC needs dask-ml and scikit-learn: pip install 'wukong[demo]'")
    from dask_ml.wrappers import ParallelPostFit
    from sklearn.datasets import make_classification
    from sklearn.svm import SVC

    n, chunk = (400_000, 10_000) if full else (20_000, 1_000)
    samples, classes = make_classification(n_samples=1_000, n_features=20, random_state=0)
    model = ParallelPostFit(SVC(gamma="scale")).fit(samples, classes)
    x = da.random.default_rng(5).normal(size=(n, 20), chunks=(chunk, 20))

    # One row in twenty at full size: scikit-learn on one core would need longer than the rest.
    step = 20 if full else 1
    expected = cache(lambda: model.estimator.predict(x.compute(scheduler="sync")[::step]))

    def check(values: Sequence[object]) -> list[Check]:
        wrong = np.count_nonzero(np.asarray(values[0])[::step] != expected())
        return [Check("wrong classes", float(wrong), 0.0)]

    return Problem((model.predict(x),), int(x.nbytes), check)


WORKLOADS = (
    Workload("TR", "tree reduction", tree_reduction),
    Workload("GEMM", "matrix product", matrix_product),
    Workload("SVD1", "SVD, tall-skinny", tall_skinny_svd),
    Workload("SVD2", "SVD, compressed", square_svd),
    Workload("TSQR", "QR, tall-skinny", tall_skinny_qr),
    Workload("SVC", "SVC prediction", svc_prediction),
)


def _tall_skinny(full: bool) -> da.Array:
    """A tall-and-skinny matrix, 2,000,000 x 64 in 64 chunks at full size."""
    n, n_chunks = (2_000_000, 64) if full else (100_000, 32)
    x: da.Array = da.random.default_rng(2).random((n, 64), chunks=(n // n_chunks, 64))
    return x


def _blocks(x: da.Array) -> Iterator[Floats]:
    """Yield the blocks of the leading axis in order, one in memory at a time."""
    for block in x.blocks:
        yield block.compute(scheduler="sync")


def _column_blocks(x: da.Array) -> Iterator[Floats]:
    """Yield the blocks of the last of two axes, one in memory at a time."""
    for number in range(x.numblocks[1]):
        yield x.blocks[:, number].compute(scheduler="sync")


def _gram(x: da.Array) -> Floats:
    """x'x, by numpy."""
    gram: Floats = np.zeros((x.shape[1], x.shape[1]))
    for block in _blocks(x):
        gram += block.T @ block
    return gram


def _largest_singular_value(x: da.Array) -> float:
    """By power iteration in numpy; a uniform random matrix has one value far above the others."""
    dense = x.compute(scheduler="sync")
    vector = np.ones(dense.shape[1]) / math.sqrt(dense.shape[1])
    norm = 0.0
    for _ in range(20):
        vector = dense.T @ (dense @ vector)
        norm = float(np.linalg.norm(vector))
        vector /= norm
    return math.sqrt(norm)


def _positive_rows(r: Floats) -> Floats:
    """R with the signs that make its diagonal positive, which makes it unique."""
    positive: Floats = r * np.where(np.diag(r) < 0, -1.0, 1.0)[:, None]
    return positive


def _relative(found: Floats, expected: Floats) -> float:
    """The largest absolute difference over the largest expected magnitude."""
    if np.shape(found) != np.shape(expected):
        return math.inf
    return float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))

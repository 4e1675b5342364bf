"""A fixed sample of Dask's own tests ends with Wukong as it ends with Dask's schedulers.

`python -m tests.dask_suites --full` compares all of them.
"""

import pytest

from tests.dask_suites.__main__ import SAMPLE, describe
from tests.dask_suites.runner import compare


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["threads", "processes"])
def test_dasks_own_tests_end_as_with_dasks_schedulers(mode: str) -> None:
    comparison = compare(mode, SAMPLE)
    assert sum(counts.total() for counts in comparison.counts.values()) == SAMPLE
    assert not comparison.unexpected, "\n" + describe(comparison)

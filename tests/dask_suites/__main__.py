"""python -m tests.dask_suites: which of Dask's own tests end differently with Wukong."""

from __future__ import annotations

import argparse
import sys

from tests.dask_suites.runner import SUITES, Comparison, compare

SAMPLE = 150
"""Of each mode: what fits into three minutes, most of which the collection of tests takes."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.dask_suites", description=__doc__)
    parser.add_argument("--mode", choices=("threads", "processes"), help="by default both")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--sample", type=int, default=SAMPLE, help="how many tests, always the same")
    size.add_argument("--full", action="store_true", help="all of them")
    parser.add_argument(
        "suites", nargs="*", default=SUITES, help="packages or files; by default all"
    )
    options = parser.parse_args()
    n_unexpected = 0
    for mode in (options.mode,) if options.mode else ("threads", "processes"):
        comparison = compare(mode, None if options.full else options.sample, options.suites)
        sys.stdout.write(describe(comparison))
        sys.stdout.flush()
        n_unexpected += len(comparison.unexpected)
    return 1 if n_unexpected else 0


def describe(comparison: Comparison) -> str:
    lines = []
    for suite, counts in sorted(comparison.counts.items()):
        listed = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items()))
        lines.append(f"{comparison.mode:10} {suite:17} {listed}")
    for difference in comparison.differences:
        dask, wukong = difference.outcomes
        lines.append(f"\n{difference.test}: {dask} with Dask's scheduler, {wukong} with Wukong's")
        reason = difference.reason
        lines.append(difference.text if reason is None else f"  accepted: {reason}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

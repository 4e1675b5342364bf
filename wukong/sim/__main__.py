"""Replay seeds, or explore new ones: `python -m wukong.sim --seed 17 --count 1000`."""

from __future__ import annotations

import argparse
import sys
import time

from wukong.sim import Violation
from wukong.sim.seeds import run_seed
from wukong.sim.seeds_open import run_open_seed


def write_line(line: str) -> None:
    """Print."""
    sys.stdout.write(line + "\n")


def main() -> int:
    """Run seeds and say which fail."""
    parser = argparse.ArgumentParser(prog="python -m wukong.sim", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=1, help="how many seeds")
    parser.add_argument("--trace", action="store_true", help="print every action and event")
    parser.add_argument("--open", action="store_true", help="open jobs, extended and released")
    given = parser.parse_args()
    run = run_open_seed if given.open else run_seed
    failed = 0
    begun = time.perf_counter()
    for seed in range(given.seed, given.seed + given.count):
        try:
            report = run(seed, write_line if given.trace else None)
        except Violation as violation:
            failed += 1
            write_line(f"seed {seed}: {violation}")
        else:
            if given.count == 1:
                write_line(repr(report))
    took_s = time.perf_counter() - begun
    write_line(f"{given.count} seeds, {failed} failed, {took_s / given.count * 1e3:.1f} ms each")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())

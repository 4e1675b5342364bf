"""Replay seeds, or explore new ones: `python -m wukong.sim --seed 17 --count 1000`."""

from __future__ import annotations

import argparse
import sys
import time

from wukong.sim import Violation, run_world
from wukong.sim.seeds import draw_setting, run_seed
from wukong.sim.world import World


def main() -> int:
    """Run seeds and say which fail."""
    parser = argparse.ArgumentParser(prog="python -m wukong.sim", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=1, help="how many seeds")
    parser.add_argument("--trace", action="store_true", help="print every action and event")
    given = parser.parse_args()
    failed = 0
    begun = time.perf_counter()
    for seed in range(given.seed, given.seed + given.count):
        try:
            report = run_seed(seed, given.trace)
        except Violation as violation:
            failed += 1
            sys.stdout.write(f"seed {seed}: {violation}\n")
        else:
            if given.count == 1:
                sys.stdout.write("\n".join([*report.events, repr(report.counts), ""]))
    took_s = time.perf_counter() - begun
    sys.stdout.write(f"{given.count} seeds, {failed} failed, {took_s / given.count * 1e3:.1f} ms each\n")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())

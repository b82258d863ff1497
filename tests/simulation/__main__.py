"""Simulate runs: `python -m tests.simulation --seeds N` or `--faults N`, or `--seed S` for one."""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback
from collections import Counter
from itertools import count

from tests.simulation.ranks import Violation
from tests.simulation.world import World


def main() -> int:
    """Print the faults that were tried; the exit code is 1 if a seed breaks an invariant."""
    logging.disable(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="replay one seed")
    parser.add_argument("--seeds", type=int, default=100, help="number of seeds")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--faults", type=int, help="go on until this many faults were tried")
    arguments = parser.parse_args()
    faults: Counter[str] = Counter()
    started, runs, alone = time.monotonic(), 0, 0
    last = None if arguments.faults else arguments.first + arguments.seeds
    first = arguments.first if arguments.seed is None else arguments.seed
    for seed in count(first):
        if seed == last or (arguments.faults and faults.total() >= arguments.faults):
            break
        world = World(seed)
        try:
            faults += world.run()
        except Exception as error:  # what the real code raises is found as well
            if not isinstance(error, Violation):
                traceback.print_exc()
            print(f"seed {seed}: {error}; replay: python -m tests.simulation --seed {seed}")
            return 1
        runs, alone = runs + 1, alone + world.decided_alone
        if runs % 100 == 0:
            print(f"seed {seed}: {faults.total():,} faults", file=sys.stderr, flush=True)
        if arguments.seed is not None:
            break
    seconds = time.monotonic() - started
    print(f"{faults.total():,} faults in {runs:,} runs, {seconds:.0f} s; no invariant broken")
    print(f"{alone:,} times a rank decided a step alone")
    for kind, number in faults.most_common():
        print(f"  {kind:10} {number:,}")
    return 0


sys.exit(main())

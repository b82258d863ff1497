"""A whole run in one thread under a virtual clock, with faults that a seed chooses.

    clock.py     the virtual clock, and processes as generators
    numbers.py   what the ranks measure, and what must be decided
    disk.py      a model of the journal: unsynced writes get lost, bits flip, the disk is full
    network.py   streams that delay, double and lose messages
    ranks.py     the ranks of a job, with the real protocol
    world.py     all of it, the faults and the invariants

`python -m tests.simulation --seed S` replays one seed; `make simulate SEEDS=N` tries many.
"""

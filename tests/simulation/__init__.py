"""A whole run in one thread under a virtual clock, with faults that a seed chooses.

The ranks run the real `Client` with its stream, protocol and threads; the coordinator is the real
registry with its sessions and rounds. Only threads, times, gRPC and the disk are replaced.

    clock.py      the virtual clock, and threads as greenlets
    threads.py    Python's locks, queues and times for the real code
    grpc_stub.py  a rank's end of gRPC for the real code
    network.py    streams that delay, double and lose messages
    disk.py       a model of the journal: unsynced writes get lost, bits flip, the disk is full
    numbers.py    what the ranks measure, and what must be decided
    ranks.py      the ranks of a job: a training loop around the real client
    operator.py   commands that are given while all this happens
    faults.py     the kinds of faults
    world.py      all of it, and the invariants
    mutations.py  faults in the code, which the simulation must find

`python -m tests.simulation --seed S` replays one seed; `make simulate SEEDS=N` tries many.
"""

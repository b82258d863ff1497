"""Runs to which real faults happen, and which end in the bits of an undisturbed run.

    plan.py        planned faults: kind, phase, step, rank
    moments.py     where the phases lie: functions of the package, wrapped by the tests
    actions.py     what a fault does to a process or a file
    outside.py     a coordinator behind a TCP proxy that cuts, loses and delays
    namespaces.py  two hosts with a bad link; a small file system
    survive.py     starts a run again until it is done, and compares the results
    soak.py        random faults: python -m tests.faults.soak
    measure.py     what recovery costs: python -m tests.faults.measure

Not covered: every order of messages (`tests/simulation`); GPUs.
"""

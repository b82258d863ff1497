"""Thousands of faults break no invariant; a fault that is put into the code is found."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.simulation import world
from tests.simulation.faults import SELDOM
from tests.simulation.mutations import LONGEST, MUTATIONS, finds_a_fault
from tests.simulation.world import World


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


def test_no_fault_breaks_an_invariant() -> None:
    faults: Counter[str] = Counter()
    alone, losses, threads = 0, set(), set(threading.enumerate())
    for seed in range(8, 20):
        simulated = World(seed)
        faults += simulated.run()
        alone += simulated.decided_alone
        losses.add(simulated.numbers.on_loss)
    assert faults.total() > 1500
    assert alone > 500
    assert len(faults) == len(SELDOM) + 4, faults  # every kind was tried
    assert losses == {"decide_alone", "wait", "stop"}
    # Threads of earlier tests may end meanwhile.
    assert set(threading.enumerate()) <= threads, "a part of the code was not simulated"


def test_a_seed_always_does_the_same() -> None:
    first, second = World(3), World(3)
    assert first.run() == second.run()
    assert first.clock.now == second.clock.now


SEEDS = {
    "the deadline is waited for in every step": 0,
    "the first step that is missing is not settled": 0,
    "a step that was decided alone does not count": 0,
}
"""Faults, and a seed that finds each. A change of the simulation may need other seeds."""


@pytest.mark.parametrize("name", SEEDS)
def test_a_fault_in_the_code_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTATIONS[name].apply(monkeypatch)
    monkeypatch.setattr(world, "LONGEST", LONGEST)
    assert any(map(finds_a_fault, [SEEDS[name], *range(30)])), "no seed has found it"

"""A run ends in the same bits whatever happens to its processes, connections, files and values.

Every fault is real: a signal, a broken connection, a file that cannot grow. Several faults share a
run where they do not hide each other. `python -m tests.faults.soak` draws more.

Not covered: two hosts, a full file system (`test_namespaces.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.outside import Outside
from tests.faults.plan import Fault
from tests.faults.soak import soak
from tests.faults.survive import check, differences, survive

SERVED = [
    Fault("cut", "deciding", 4),
    Fault("lose-responses", "forward", 10, rank=1),
    Fault("kill-coordinator", "exchange", 16, rank=1),
    Fault("lag", "backward", 24),
    Fault("lose-requests", "update", 29),
    Fault("refuse", "deciding", 34, seconds=0.5),
    Fault("stop-coordinator", "settling", 38),
    Fault("cut", "leaving", 44, rank=1),
]

CASES = {
    "connections": ([0], SERVED),
    "killed": (
        [4, 4, 4, -9, 0],
        [
            Fault("kill", "starting", rank=1),
            Fault("kill", "writing", 8),
            Fault("kill", "evaluating", 20, rank=1),
            Fault("kill-launcher", "exchange", 40, rank=1),
        ],
    ),
    "asked to end": (
        [143, 143, 0],
        [Fault("terminate", "backward", 13, rank=1), Fault("terminate-launcher", "saving", 30)],
    ),
    "slow": (
        [0],
        [
            Fault("double", "forward", 1, seconds=60),
            Fault("double", "forward", 1, rank=1, seconds=60),
            Fault("stop", "backward", 4, rank=1),
            Fault("hold-gil", "deciding", 12),
            Fault("delay", "saving", 18, rank=1),
            Fault("stop", "writing", 23),
            Fault("delay", "recording", 30),
        ],
    ),
    "damaged files": (
        [4, 4, 0],
        [Fault("flip-bit", "forward", 18), Fault("tear", "update", 33)],
    ),
    "values": (
        [3, 3, 0],
        [Fault("nan-images", "loading", 12, rank=1), Fault("nan-gradient", "loading", 24)],
    ),
    "files that cannot grow": (
        [0],
        [Fault("limit-files", "update", 8), Fault("limit-files", "weights", 20)],
    ),
    "two at once": (
        [4, 143, 0],
        [
            Fault("kill-coordinator", "forward", 12, seconds=0.5),
            Fault("kill", "forward", 12, rank=1),
            Fault("limit-files", "saving", 28, start=2, seconds=60),
            Fault("terminate", "saving", 28, rank=1, start=2),
        ],
    ),
}
"""By name: the exit codes of the starts, and the faults."""


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    served = Outside(tmp_path_factory.mktemp("outside"))
    yield served
    served.close()


@pytest.mark.parametrize("case", CASES)
def test_a_run_ends_in_the_same_bits(
    case: str, expected: Path, outside: Outside, tmp_path: Path
) -> None:
    codes, faults = CASES[case]
    result = survive(tmp_path, faults, outside)
    assert check(result, expected) == [], result.log
    assert sorted(map(str, result.used)) == sorted(map(str, faults)), result.log
    assert result.codes == codes, result.log


def test_a_loader_process_that_is_killed_changes_no_bit(expected: Path, tmp_path: Path) -> None:
    faults = [Fault("kill-loader", "loading", 15, rank=1)]
    result = survive(tmp_path, faults, words=["data.workers=1"])
    assert check(result, expected) == [], result.log
    assert result.used == faults


def test_a_different_run_is_found(expected: Path, tmp_path: Path) -> None:
    result = survive(tmp_path, [], words=["seed=1"])
    found = differences(result.folder / "out", expected)
    assert {"decisions.jsonl", "weights/teacher.pt", "metrics.jsonl"} <= set(found)


def test_random_faults_change_no_bit(tmp_path: Path) -> None:
    total = soak(tmp_path, seed=1, faults=6)
    assert not total.wrong, total.report()
    assert total.happened.total() >= 6
    assert max(total.rank_descriptors) < 100

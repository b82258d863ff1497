"""The ranks of one pod: which they are, and the exit code that the pod ends with.

Not covered: a whole training (`tests/deploy/test_cluster.py`).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from switokd.cli.pod_ranks import ranks_of_pod
from switokd.errors import UsageError
from tests.preloaded import call, run_module
from tests.support import free_port

POD = {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "6", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


@pytest.mark.parametrize(("pod", "ranks"), [("0", [0, 1]), ("1", [2, 3]), ("2", [4, 5])])
def test_the_index_of_a_pod_says_which_ranks_it_has(pod: str, ranks: list[int]) -> None:
    assert list(ranks_of_pod({**POD, "NODE_RANK": pod})) == ranks


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "environment variables NODE_RANK are not set"),
        ({"NODE_RANK": "3"}, "NODE_RANK=3, LOCAL_WORLD_SIZE=2: such a pod has no ranks"),
        ({"NODE_RANK": "0", "LOCAL_WORLD_SIZE": "0"}, "such a pod has no ranks"),
        ({"NODE_RANK": "x"}, "NODE_RANK=x: allowed: a whole number"),
    ],
)
def test_variables_that_do_not_fit_are_told(changed: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ranks_of_pod({**POD, **changed})


def test_the_exit_code_of_a_mistake_stays(tmp_path: Path) -> None:
    variables = {**POD, "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    variables["MASTER_PORT"] = str(free_port())
    words = ("switokd.cli.pod_ranks", "digits-1t1s", "schedule.epochs=nonsense")
    code, _, err = call(tmp_path, run_module, *words, seconds=90, **variables)
    assert code == 2
    assert "schedule.epochs" in err

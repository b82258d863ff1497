"""How many processes `switokd train` starts.

Not covered: real processes (`test_auto.py`).
"""

from __future__ import annotations

import pytest

from switokd.config.run_file import load
from switokd.planning.processes import processes_for
from switokd.runtime.environment import ProcessLayout

AUTO = ["placement=auto", "device=cpu"]


@pytest.fixture
def twelve_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve logical cores; PyTorch would use six threads."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("switokd.planning.processes.cores", lambda: 12)
    monkeypatch.setattr("torch.get_num_threads", lambda: 6)


@pytest.mark.parametrize(
    ("settings", "layouts"),
    [
        ([], ["12x1", "6x2", "3x4", "1x6"]),
        (["data.batch_size=8"], ["4x3", "2x6", "1x6"]),  # at least two images per process
        (["data.batch_size=2"], ["1x6"]),
        (["coordinator=off"], []),
        (["placement=replicated"], []),
    ],
)
@pytest.mark.usefixtures("twelve_cores")
def test_auto_may_halve_the_number_of_processes_repeatedly(
    settings: list[str], layouts: list[str]
) -> None:
    config = load("digits-1t1s", [*AUTO, *settings])
    count, options = processes_for(config)
    assert [layout.code for layout in options] == layouts
    assert [ProcessLayout.of(layout.code) for layout in options] == options
    assert count == (options[0].processes if options else 1)


@pytest.mark.usefixtures("twelve_cores")
def test_omp_num_threads_holds_for_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    count, options = processes_for(load("digits-1t1s", AUTO))
    assert (count, [layout.code for layout in options]) == (2, ["2x6", "1x6"])


@pytest.mark.usefixtures("twelve_cores")
def test_each_gpu_gets_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("switokd.runtime.device.gpu_count", lambda: 3)
    config = load("digits-1t1s", ["placement=auto"])
    assert processes_for(config) == (3, [])
    alone = load("digits-1t1s", ["placement=replicated", "coordinator=off"])
    assert processes_for(alone) == (1, [])
    assert processes_for(load("digits-1t1s", AUTO))[1]  # device=cpu

"""The results file: provenance of figures, and merging into an existing file.

Not covered: measuring figures (`test_parts.py`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from bench import machine
from bench.figures import Figure
from bench.results import Results
from tests.support import REPOSITORY, run


def figures(*names: str, value: float = 1.0) -> list[Figure]:
    return [Figure(name, (value,)) for name in names]


def written(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A file with figures of two parts."""
    path = tmp_path / "results.json"
    first = Results(path, quick=False)
    list(first.add("plain", figures("a", "b")))
    list(first.add("waits", figures("c")))
    return path


def test_each_figure_has_its_provenance(out: Path) -> None:
    content = written(out)
    assert set(content) == {"hardware", "versions", "quick", "figures", "failed"}
    for name, part in (("a", "plain"), ("b", "plain"), ("c", "waits")):
        provenance = content["figures"][name]["provenance"]
        assert provenance["part"] == part
        assert {"commit", "uncommitted_changes", "date", "seconds"} <= set(provenance)
        assert {"load_1_minute", "load_at_program_start"} <= set(provenance)
        assert provenance["taken_by_others"] is None or 0 <= provenance["taken_by_others"] <= 1


def test_figures_of_one_measurement_share_its_provenance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dates = iter("0123456789")
    monkeypatch.setattr(machine, "source", lambda: {"date": next(dates)})
    seconds = iter([0.0, 7.0, 7.0, 7.01, 7.01, 10.01, 10.01])  # started, figure, started, ...
    clock = SimpleNamespace(monotonic=lambda: next(seconds))
    monkeypatch.setattr("bench.results.time", clock)
    file = Results(tmp_path / "results.json", quick=False)
    list(file.add("plain", figures("a", "with a", "b")))
    provenance = {n: f["provenance"] for n, f in written(file.path)["figures"].items()}
    assert provenance["with a"] == provenance["a"]
    assert (provenance["a"]["date"], provenance["a"]["seconds"]) == ("0", 7.0)
    assert (provenance["b"]["date"], provenance["b"]["seconds"]) == ("2", 3.0)


def test_merging_replaces_the_part_and_keeps_the_others(out: Path) -> None:
    before = written(out)["figures"]
    list(Results(out, quick=False, merge=True).add("plain", figures("a", "d", value=2.0)))
    after = written(out)["figures"]
    assert list(after) == ["a", "c", "d"]
    assert after["c"] == before["c"]
    assert after["a"]["median"] == after["d"]["median"] == 2.0


def test_a_failed_part_keeps_its_older_figures(out: Path) -> None:
    def failing() -> Iterator[Figure]:
        yield from figures("a", value=2.0)
        raise RuntimeError("broken")

    file = Results(out, quick=False, merge=True)
    with pytest.raises(RuntimeError, match="broken"):
        list(file.add("plain", failing()))
    file.fail("plain", "broken")
    assert file.failed == written(out)["failed"] == {"plain": "broken"}
    medians = {name: figure["median"] for name, figure in written(out)["figures"].items()}
    assert medians == {"a": 2.0, "b": 1.0, "c": 1.0}
    again = Results(out, quick=False, merge=True)
    list(again.add("plain", figures("a", "b")))
    assert again.failed == written(out)["failed"] == {}


def test_an_unfinished_part_is_marked_as_failed(tmp_path: Path) -> None:
    """For example because the machine was taken away."""
    file = Results(tmp_path / "results.json", quick=False)
    for _ in file.add("plain", figures("a", "b")):
        assert written(file.path)["failed"] == {"plain": "it did not finish"}
    assert written(file.path)["failed"] == file.failed == {}


def test_without_merging_a_file_is_replaced(out: Path) -> None:
    list(Results(out, quick=False).add("waits", figures("c")))
    assert list(written(out)["figures"]) == ["c"]


def test_merging_into_a_missing_file_creates_it(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    list(Results(out, quick=False, merge=True).add("waits", figures("c")))
    assert list(written(out)["figures"]) == ["c"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hardware": {"cpu": "another"}}, "hardware.cpu is 'another' there and "),
        ({"versions": {"torch": "1.0"}}, "versions.torch is '1.0' there and "),
        ({"quick": True}, "quick is True there and False here"),
    ],
)
def test_merging_needs_the_same_conditions(out: Path, change: Any, words: str) -> None:
    content = written(out)
    for key, value in change.items():
        content[key] = content[key] | value if isinstance(value, dict) else value
    out.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has other conditions: ") as error:
        Results(out, quick=False, merge=True)
    assert words in str(error.value)
    assert written(out) == content


@pytest.mark.parametrize("text", ["", "[]", '{"figures": {"a": {"median": 1}}, "failed": {}}'])
def test_merging_needs_figures_with_provenance(out: Path, text: str) -> None:
    out.write_text(text)
    with pytest.raises(ValueError, match="no figures with their provenance"):
        Results(out, quick=False, merge=True)


def test_the_command_refuses_to_merge_before_it_measures(out: Path) -> None:
    command = [sys.executable, "-m", "bench", "--only", "waits", "--quick", "--merge", "--out"]
    code, printed, errors = run([*command, str(out)], REPOSITORY, seconds=60)
    assert (code, printed) == (2, "")
    (line,) = errors.splitlines()
    assert line.startswith(f"python -m bench: {out} has other conditions: quick is False there")


def test_time_of_child_processes_is_not_time_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cores have worked 10 s, part of it for a child process and for this process."""
    busy = iter([100.0, 110.0, 110.0])
    monkeypatch.setattr(machine, "busy_seconds", lambda of: next(busy))
    monkeypatch.setattr(machine, "cores", lambda: len(os.sched_getaffinity(0)))
    clock = iter([0.0, 20.0, 20.0, 40.0])
    monkeypatch.setattr("bench.machine.time", SimpleNamespace(monotonic=lambda: next(clock)))
    others, available = machine.Others(), 20.0 * len(os.sched_getaffinity(0))
    before = os.times()
    burn = "import time\nwhile time.process_time() < 1.1: pass"
    subprocess.run([sys.executable, "-c", burn], check=True)
    share, after = others.share(), os.times()
    ours = sum(after[:4]) - sum(before[:4])
    assert ours > 1
    assert share == pytest.approx((10.0 - ours) / available, abs=0.2 / available)

    monkeypatch.setattr(machine, "cores", lambda: 0)  # a container with a share of the cores' time
    assert machine.Others().share() is None


def test_busy_seconds_count_the_work_of_any_process() -> None:
    all_cores = range(len(psutil.cpu_times(percpu=True)))
    before = machine.busy_seconds(all_cores)
    burn = "import time\nwhile time.process_time() < 1: pass"
    subprocess.run([sys.executable, "-c", burn], check=True)
    assert machine.busy_seconds(all_cores) - before > 0.9

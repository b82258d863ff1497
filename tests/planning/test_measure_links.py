"""Measuring collectives between real processes."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

from switokd.planning import measure_links
from switokd.runtime.environment import Environment
from switokd.runtime.process_group import World
from tests.preloaded import call, run_script

SCRIPT = """
import json, os, torch
from switokd.runtime.environment import environment
from switokd.planning.measure_links import measure_links
from switokd.runtime.process_group import join_world

env = environment()
with join_world(env, torch.device("cpu"), 60) as world:
    found = measure_links(world, 0.25)
    os.write(1, (found.model_dump_json() + "\\n").encode())
"""


def test_latency_and_bandwidth_are_measured_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    code, out, err = call(tmp_path, run_script, 2, "script.py", ())
    assert code == 0, err
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert len(found) == 2
    for each in found:
        assert each["description"] == "gloo between 2 ranks, measured"
        assert each["decision_seconds"] == 0.25
        assert 1e-6 < each["latency_seconds"] < 1
        assert 1e6 < each["bandwidth_bytes_per_second"] < 1e13


THREADS = """
import os, psutil, time, torch
from switokd.runtime.environment import environment
from switokd.planning.measure_links import measure_links
from switokd.runtime.process_group import join_world

me, env = psutil.Process(), environment()

def measured(world):
    with world.first(2) as few:
        found = measure_links(few, 0.0) if world.rank < 2 else None
        return me.num_threads() - before, found

with join_world(env, torch.device("cpu"), 60) as world:
    before = me.num_threads()
    meanwhile, found = measured(world)
    assert (found is not None) == (meanwhile > 0) == (world.rank < 2)
    deadline = time.monotonic() + 30
    while me.num_threads() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    os.write(1, f"{world.rank}: {me.num_threads() - before} threads too many\\n".encode())
"""


def test_process_group_of_some_ranks_is_removed_afterwards(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(THREADS)
    code, out, err = call(tmp_path, run_script, 3, "script.py", ())
    assert code == 0, err
    assert sorted(out.splitlines()) == [f"{rank}: 0 threads too many" for rank in range(3)]


def test_latency_and_bandwidth_predict_the_measured_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The latency and bandwidth reproduce the seconds of the two all-reduces."""
    taken = {measure_links.SMALL: 0.001, measure_links.LARGE: 0.011}
    monkeypatch.setattr(measure_links, "_seconds", lambda world, size: taken[size])
    found = measure_links.measure_links(World(Environment(world_size=4), torch.device("cpu")), 0.25)
    assert found is not None
    assert found.all_reduce(4, 0) == pytest.approx(0.001)
    assert found.all_reduce(4, 4 * measure_links.LARGE) == pytest.approx(0.011)
    # Each of four ranks sends and receives 1.5 times the 8 MiB.
    assert found.bandwidth_bytes_per_second == pytest.approx(1.5 * 2**23 / 0.010)


def test_one_rank_has_no_links(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.replace("found.model_dump_json()", "repr(found)"))
    code, out, err = call(tmp_path, runpy.run_path, "script.py")
    assert (code, out.strip()) == (0, "None"), err

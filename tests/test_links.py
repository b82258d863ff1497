"""Measuring collectives between two real processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.support import TORCHRUN, run

SCRIPT = """
import json, os, torch
from switokd.environment import environment
from switokd.links import measure_links
from switokd.world import join_world

env = environment()
with join_world(env, torch.device("cpu"), 60) as world:
    found = measure_links(world, 0.25)
    os.write(1, (found.model_dump_json() + "\\n").encode())
"""


def test_latency_and_bandwidth_are_measured_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [TORCHRUN, "--standalone", "--nproc-per-node=2", "script.py"]
    code, out, err = run(command, tmp_path)
    assert code == 0, err
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert len(found) == 2
    for each in found:
        assert each["description"] == "gloo between 2 ranks, measured"
        assert each["decision_seconds"] == 0.25
        assert 1e-6 < each["latency_seconds"] < 1
        assert 1e6 < each["bandwidth_bytes_per_second"] < 1e13


def test_one_rank_has_no_links(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.replace("found.model_dump_json()", "repr(found)"))
    code, out, err = run([sys.executable, "script.py"], tmp_path)
    assert (code, out.strip()) == (0, "None"), err

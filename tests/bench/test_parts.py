"""Every part of the benchmark runs with --quick, and writes and prints its figures.

Not covered: the values of the figures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import devices, placements
from bench.__main__ import PARTS
from switokd.runtime.environment import cores
from tests.preloaded import call, run_module
from tests.support import REPOSITORY

GROUPS = {
    "ranks": ("waits", "simulated", "planning"),
    "one-process": ("roofline", "profile", "paused", "input", "gpu", "nccl"),
    "coordinator": ("coordinator", "scale", "bursts", "busy"),
    "commands": ("plain", "start"),
}
"""Parts that one process measures: the parts of `ranks` fork their ranks from one server."""


def test_each_part_is_in_one_group() -> None:
    assert sorted(part for group in GROUPS.values() for part in group) == sorted(PARTS)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("group", GROUPS)
def test_parts_run_and_write_their_figures(group: str, tmp_path: Path) -> None:
    parts, out = [part for part in PARTS if part in GROUPS[group]], tmp_path / "results.json"
    words = ("bench", "--quick", "--only", ",".join(parts), "--out", str(out))
    # Threads that wait busily would be ten times slower on shared cores.
    code, printed, errors = call(
        REPOSITORY, run_module, *words, seconds=280, OMP_WAIT_POLICY="passive"
    )
    assert code == 0, f"{printed}\n{errors}"
    results = json.loads(out.read_text())
    assert not results["failed"]
    for part in parts:
        _check_part(part, results["figures"], printed, printed.partition(f"{parts[-1]} took ")[2])


def _check_part(part: str, written: Mapping[str, Any], printed: str, tables: str) -> None:
    """Check a part's figures in results.json, and what was printed; tables: printed at the end."""
    figures = {n: figure for n, figure in written.items() if figure["provenance"]["part"] == part}
    names = set(PARTS[part].FIGURES)
    assert {n for n in written if n in names} == set(figures) <= names
    # --quick has no compiled step and only one case.
    if part not in ("profile", "plain", *NEEDS_GPUS):
        assert set(figures) == names
    if part in NEEDS_GPUS and torch.cuda.device_count() < 2:
        assert torch.cuda.is_available() or NEEDS_GPUS[part] in printed
    during, _, _ = printed.partition(f"{part} took ")
    for name, figure in figures.items():
        assert {"median", "min", "max", "pairs", "target", "reached"} <= set(figure)
        assert name in during
        assert name in tables
        if rows := figure["details"].get("rows"):
            table = re.split(rf"^ *{name}(?: \(simulation\))? *$", tables, flags=re.MULTILINE)[1]
            headings = table.partition("└")[0]
            for line in rows:
                assert all(heading.replace("_", " ").split()[0] in headings for heading in line)
    if part in FURTHER_CHECKS:
        FURTHER_CHECKS[part](figures)


NEEDS_GPUS = {"gpu": "no GPU: nothing to measure", "nccl": "0 GPUs: NCCL needs at least 2"}


def _check_plain(figures: dict[str, Any]) -> None:
    figure = figures["plain_fp32_1t2s"]
    ((plain_share, our_share),) = figure["details"]["expert_plain_and_ours"]
    assert plain_share == our_share  # same networks, batches and rule
    assert "both as published" in figure["what"]
    assert figure["details"]["paused_ours"] == [0.0]


def _check_simulated(figures: dict[str, Any]) -> None:
    """Three devices; time is slowed down on fewer cores, except for the `_unslowed` figures."""
    for table in ("simulated_strong_scaling", "simulated_weak_scaling"):
        assert figures[table]["details"]["rows"]
    per_sample = devices.SECONDS_PER_SAMPLE / placements.QUICK
    for suffix, times in (("", 1), ("_unslowed", 2), ("_with_gradients", 5)):
        error = figures[f"plan_error{suffix}"]
        best, *_ = error["details"]["runs"]
        slowed = max(3 / cores(), 1) if suffix != "_unslowed" else 1
        assert (best["devices"], best["batch"], best["slowed"]) == (3, 96, slowed)
        assert best["ideal_seconds"] == pytest.approx(slowed * times * 32 * per_sample)
        assert 0 < best["efficiency"] < 1  # a step takes at least the time of its waits
        assert error["median"] == best["plan_error"]
        worst = max(r["plan_error"] for r in error["details"]["runs"])
        assert error["details"]["worst_of_all"] == worst
        assert figures[f"simulated_efficiency{suffix}"]["median"] == best["efficiency"]
        assert (error["target"] is None) == (suffix == "_unslowed")
    (row,) = figures["simulated_weak_scaling"]["details"]["rows"]
    assert row["placement"] == figures["plan_error"]["details"]["runs"][0]["placement"]


FURTHER_CHECKS = {"plain": _check_plain, "simulated": _check_simulated}

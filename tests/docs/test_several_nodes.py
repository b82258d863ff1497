"""The commands of how-to/several-nodes.md, word for word, on two network namespaces.

Not covered: NCCL, GPUs, a firewall.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.docs.blocks import blocks
from tests.docs.machines import run_on_machines
from tests.preloaded import call
from tests.support import BIN, REPOSITORY, lines, require, unshare

PAGE = REPOSITORY / "docs" / "how-to" / "several-nodes.md"


@pytest.mark.timeout(300)
def test_two_machines_train_as_the_page_says(tmp_path: Path) -> None:
    for program, package in (("ip", "iproute2"), ("nsenter", "util-linux")):
        require(program, package)
    unshare("-rmn")
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("there is no /dev/net/tun")
    found = list(blocks(PAGE))
    listed = [(b.markers["on"], b.line, b.executed) for b in found if "on" in b.markers]
    assert [machine for machine, _, _ in listed] == ["gpu1", "gpu1", "gpu2", "gpu2"]
    (tmp_path / "blocks.json").write_text(json.dumps(listed))
    work = tmp_path / "work"
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    code, out, err = call(work, run_on_machines, tmp_path / "blocks.json", seconds=280, PATH=path)
    assert code == 0, f"{out}\n{err}"
    run = work / "gpu1" / "runs" / "two"
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["networks"]) == {"teacher", "student"}
    assert [d["step"] for d in lines(run / "decisions.jsonl")] == list(range(1, 13))
    assert "digits-1t1s" in out  # of `switokd runs` on the second machine
    assert sorted(p.name for p in (work / "gpu2").iterdir()) == ["certs"], "only rank 0 writes"
    assert sorted(p.name for p in (work / "gpu2" / "certs").iterdir()) == ["ca.crt", "worker.token"]

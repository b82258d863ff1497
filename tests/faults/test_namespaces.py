"""Two hosts with a bad link, and a file system that is really full: the run ends in the same bits.

Skipped where the system permits no namespaces, as containers often do; in CI that is a failure.

Not covered: all other faults (`test_faults.py`).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.namespaces import on_small_disk, two_hosts
from tests.faults.plan import Fault, used, write_plan
from tests.faults.survive import WORDS, check, differences, survive
from tests.preloaded import call
from tests.support import require, unshare

LINKS = {
    "cut for two seconds": ([0], 2.0, []),
    "cut for good": ([4, 0], 1000.0, ["coordinator.timeout=3"]),
}
"""By name: the exit codes of the starts, the seconds of the cut, and settings."""


@pytest.mark.parametrize("link", LINKS)
def test_two_hosts_with_a_bad_link_end_in_the_same_bits(
    link: str, expected: Path, tmp_path: Path
) -> None:
    require("ip", "iproute2")
    unshare("-rn")
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("there is no /dev/net/tun")
    codes, seconds, words = LINKS[link]
    faults = [Fault("cut-link", "exchange", 13, seconds=seconds)]
    result = survive(tmp_path, faults, words=words, ranks=two_hosts)
    assert check(result, expected) == [], result.log
    assert (result.used, result.codes) == (faults, codes), result.log


def test_a_full_disk_changes_no_bit(expected: Path, tmp_path: Path) -> None:
    """Full for a while; full until the run ends; full when SIGTERM comes."""
    unshare("-rm")
    faults = [
        Fault("fill-disk", "update", 8),
        Fault("free-disk", "update", 17),
        Fault("fill-disk", "forward", 20),
        Fault("fill-disk", "forward", 33, start=2),
        Fault("terminate", "forward", 34, rank=1, start=2),
    ]
    plan = tmp_path / "plan"
    write_plan(plan, faults)
    words = (*WORDS, "run_dir=out", "resume=auto")
    code, out, err = call(
        tmp_path, on_small_disk, 2, words, seconds=100, SWITOKD_TEST_PLAN=str(plan)
    )
    assert code == 0, f"{out}\n{err}"
    assert differences(tmp_path / "kept", expected) == []
    assert used(plan) == faults, f"{out}\n{err}"
    assert "start 2: exit code" in out
    assert "cannot be written: No space left on device" in err

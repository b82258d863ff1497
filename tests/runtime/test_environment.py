"""What a process may use of its machine, in a container with limits.

Not covered: cgroups of version 1; other systems than Linux.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.support import run, unshare

FOUND = """
import json, torch
from switokd.runtime.environment import cores
from switokd.runtime.allocator import machine_memory
from switokd.runtime.threads import stay_within_limits

stay_within_limits()
print(json.dumps([cores(), machine_memory(), torch.get_num_threads()]))
"""


def test_a_containers_limits_count(tmp_path: Path) -> None:
    """Mount files over those of the machine, as a container would see them."""
    beginning = unshare("-rm")
    limits = tmp_path / "limits"
    limits.mkdir()
    (limits / "cpu.max").write_text("100000 100000\n")  # a core's worth
    (limits / "memory.max").write_text("1000000000\n")
    inside = 'mount --bind "$0" /sys/fs/cgroup && unset OMP_NUM_THREADS && exec "$@"'
    command = [*beginning, "sh", "-c", inside, str(limits), sys.executable, "-c", FOUND]
    code, out, err = run(command, tmp_path)
    assert code == 0, err
    assert json.loads(out) == [1, 1_000_000_000, 1]
    (limits / "cpu.max").write_text("max 100000\n")
    (limits / "memory.max").write_text("max\n")
    code, out, err = run(command, tmp_path)
    assert code == 0, err
    _, memory, _ = json.loads(out)
    assert memory > 1_000_000_000

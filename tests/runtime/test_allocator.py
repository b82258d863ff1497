"""The settings of the allocator. Each test starts a process, because the settings last."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest

from tests.preloaded import call, run_script

# Faults per large tensor that is made, written, and freed again, as a step does.
FAULTS = """
import json, re, resource, sys
import torch
from switokd.runtime.allocator import give_back_freed_memory, keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "keep" else False

def step():
    torch.ones(16 * 2**20)  # 64 MiB: above what glibc ever keeps by itself

for _ in range(30):  # the first ones find no hole that is aligned as they need it
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def huge():
    areas = open("/proc/self/smaps").read()
    return sum(int(kilobytes) for kilobytes in re.findall("AnonHugePages: +([0-9]+)", areas))

tensor = torch.ones(64 * 2**20)
found = {"kept": kept, "faults": faults / 10, "huge": huge()}
del tensor
if kept:
    give_back_freed_memory()
    found["huge after giving back"] = huge()
    tensor = torch.ones(64 * 2**20)
    found["huge again"] = huge()
print(json.dumps(found))
"""

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


def found_by(folder: Path, how: str) -> dict[str, Any]:
    (folder / "faults.py").write_text(FAULTS)
    code, out, err = call(folder, run_script, 1, "faults.py", (how,))
    assert code == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_there_for_the_next_step(tmp_path: Path) -> None:
    found = {how: found_by(tmp_path, how) for how in ("keep", "return")}
    assert found["keep"]["kept"]
    pages = 64 * 2**20 / 4096
    assert found["return"]["faults"] > pages / 600  # even where a page is 2 MiB
    assert found["keep"]["faults"] < found["return"]["faults"] / 10


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc"
    or not HUGE_PAGES.exists()
    or "[madvise]" not in HUGE_PAGES.read_text()
    or OVERCOMMIT.read_text().strip() == "2",
    reason="needs glibc, and a Linux that gives huge pages to those who ask",
)
def test_kept_memory_is_in_huge_pages(tmp_path: Path) -> None:
    found = found_by(tmp_path, "keep")
    large = 256 * 1024 // 2  # kB: half of the tensor at least, the rest may lie in a hole
    assert found["huge"] > large
    assert found["huge after giving back"] < large
    assert found["huge again"] > large
    assert found_by(tmp_path, "return")["huge"] == 0

"""The allocator's setting, in processes of their own: it lasts as long as they do."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import pytest

from tests.support import run

# Faults per large tensor that is made, written, and freed again, as a step does.
FAULTS = """
import json, resource, sys
import torch
from switokd.memory import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "keep" else False

def step():
    torch.ones(16 * 2**20)  # 64 MiB: above what glibc ever keeps by itself

for _ in range(30):  # the first ones find no hole that is aligned as they need it
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps({"kept": kept, "faults": faults / 10}))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_there_for_the_next_step(tmp_path: Path) -> None:
    (tmp_path / "faults.py").write_text(FAULTS)
    found = {}
    for how in ("keep", "return"):
        code, out, err = run([sys.executable, "faults.py", how], tmp_path)
        assert code == 0, err
        found[how] = json.loads(out)
    assert found["keep"]["kept"]
    pages = 64 * 2**20 / 4096
    assert found["return"]["faults"] > pages / 600  # even where a page is 2 MiB
    assert found["keep"]["faults"] < found["return"]["faults"] / 10

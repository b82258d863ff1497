"""Reads the .jsonl files of a run folder. Imported without torch.

Not covered: writing them (`run_folder.py`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a .jsonl file; an empty list if there is no such file.

    A last line without its end is left out: it is being written, or the disk was full.
    """
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]

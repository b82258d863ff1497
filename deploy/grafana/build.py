"""Writes the dashboards, deploy/grafana/dashboards/*.json.

    .venv/bin/python deploy/grafana/build.py [FOLDER]

Not covered: provisioning, which is in `provisioning/`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import service
import switching
import training

FOLDER = Path(__file__).resolve().parent / "dashboards"
DASHBOARDS = {"switching": switching, "training": training, "service": service}


def write(folder: Path) -> None:
    """Write all dashboards into a folder that exists."""
    for name, module in DASHBOARDS.items():
        text = json.dumps(module.build(), indent=2, ensure_ascii=False)
        (folder / f"{name}.json").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)

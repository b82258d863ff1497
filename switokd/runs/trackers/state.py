"""What trackers remember of a run from one process to the next, in observers.json of its folder.

Not covered: the run's id for the coordinator (`coordination/join.py`).
"""

from __future__ import annotations

import json
import os
import threading
import uuid
from pathlib import Path
from typing import Any

NAME = "observers.json"
LOCK = threading.Lock()


class TrackerState:
    """The content of observers.json. OSError if the file cannot be written."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME

    def run_id(self, name: str) -> str:
        """Return the run's id, which is made once; it begins with the run's name."""
        found = self.get("run_id")
        if found is None:
            found = f"{name}-{uuid.uuid4().hex[:12]}"
            self.set("run_id", found)
        return str(found)

    def get(self, key: str) -> Any:
        """Return what was set, also by an earlier process; None if nothing was."""
        return self._read().get(key)

    def set(self, key: str, value: Any) -> None:
        """Remember a value, for JSON; it survives the end of this process."""
        with LOCK:  # another tracker may write at the same time
            content = {**self._read(), key: value}
            # Not on the disk at once as a checkpoint is: a machine that crashes loses little.
            partial = self._path.with_name(f".{NAME}.partial")
            partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            os.replace(partial, self._path)

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # if it is damaged, the trackers begin anew
            return {}
        return content if isinstance(content, dict) else {}

"""Looks for known vulnerabilities in the packages of the images: `make audit`.

pip-audit asks PyPI about every locked version. Where PyPI's database cannot be reached, as behind a
mirror, a line says which packages were not audited, and only `pip check` counts.

Not covered: the system's packages in the images.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support import BIN, REPOSITORY

LOCKS = sorted((REPOSITORY / "deploy" / "requirements").glob("*.txt"))


def main() -> int:
    """Print what was found; 1 if a package has a known vulnerability, or packages do not fit."""
    if subprocess.run([sys.executable, "-m", "pip", "check"]).returncode:
        return 1
    command: list[str | Path] = [BIN / "pip-audit", "--disable-pip", "--no-deps", "--format=json"]
    for lock in LOCKS:
        command += ["--requirement", lock]
    done = subprocess.run(
        [*command, "--progress-spinner=off"], capture_output=True, text=True, timeout=300
    )
    if not done.stdout.startswith("{"):
        print(f"not audited: {done.stderr.strip().rpartition(chr(10))[2]}")
        return 0
    found = json.loads(done.stdout)["dependencies"]
    skipped = [package["name"] for package in found if "skip_reason" in package]
    if skipped:
        print(f"{len(skipped)} of {len(found)} packages could not be audited: PyPI has no answer")
    vulnerable = [package for package in found if package.get("vulns")]
    for package in vulnerable:
        ids = ", ".join(vulnerability["id"] for vulnerability in package["vulns"])
        print(f"{package['name']} {package['version']}: {ids}")
    return 1 if vulnerable else 0


if __name__ == "__main__":
    sys.exit(main())

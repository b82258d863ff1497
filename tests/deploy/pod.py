"""Becomes a container: `python tests/deploy/pod.py SPEC.json`, in new namespaces, as root.

The root is a small file system with the folders of this machine that a program needs and with the
volumes. It is read-only, as the manifest asks; so is everything but the volumes. Then the process
becomes the manifest's user and the manifest's command.

Not covered: an image; limits of memory and CPU; the system call filter.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

SYSTEM = ("bin", "etc", "lib", "lib64", "sbin", "usr")
NO_NEW_PRIVILEGES = 38  # PR_SET_NO_NEW_PRIVS in linux/prctl.h


def mount(*words: str | Path) -> None:
    subprocess.run(["mount", *map(str, words)], check=True)


def bind(source: Path, target: Path, read_only: bool = True) -> None:
    """Show a file or folder at another place."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    elif not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    mount("--bind", source, target)
    if read_only:
        mount("-o", "remount,bind,ro", target)


def make_root(spec: dict[str, Any]) -> Path:
    """Make the root file system of a container; return its folder."""
    root = Path(spec["root"])
    mount("-t", "tmpfs", "-o", "mode=755", "none", root)
    for name in SYSTEM:
        folder = Path("/", name)
        if folder.is_symlink():
            (root / name).symlink_to(os.readlink(folder))
        elif folder.is_dir():
            bind(folder, root / name)
    mount("--rbind", "/dev", _made(root / "dev"))
    mount("-t", "proc", "proc", _made(root / "proc"))
    for name, source in spec["files"].items():
        bind(Path(source), root / name.lstrip("/"))
    for volume in spec["mounts"]:
        target = root / volume["target"].lstrip("/")
        bind(Path(volume["source"]), target, volume["read_only"])
    # After the volumes: the programs may lie in a folder like /tmp.
    for folder in spec["programs"]:
        bind(Path(folder), root / folder.lstrip("/"))
    if spec["read_only"]:
        mount("-o", "remount,ro", root)
    return root


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    root = make_root(spec)
    socket.sethostname(spec["hostname"])
    os.chroot(root)
    os.chdir(spec["folder"])
    os.setgroups([spec["group"]])
    os.setgid(spec["group"])
    os.setuid(spec["user"])
    ctypes.CDLL(None).prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    os.environ.clear()
    os.environ.update(spec["env"])
    os.execvp(spec["command"][0], spec["command"])


if __name__ == "__main__":
    main()

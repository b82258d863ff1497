"""Becomes a container, in namespaces of its own: `python tests/deploy/pod.py SPEC.json`, as root.

The root is a small file system with the folders of this machine that a program needs and with the
volumes. It is read-only, as the manifest asks; so is everything but the volumes. Then the process
becomes the manifest's user and the manifest's command.

Not covered: an image; limits of memory and CPU; the system call filter.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

SYSTEM = ("bin", "etc", "lib", "lib64", "sbin", "usr")
NEW_MOUNTS, NEW_NAME, NEW_PROCESSES = 0x00020000, 0x04000000, 0x20000000
SET_DEATH_SIGNAL, NO_NEW_PRIVILEGES = 1, 38  # in linux/prctl.h
LIBC = ctypes.CDLL(None, use_errno=True)


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
    """Start the container's first process, and end with its exit code as the kubelet tells it."""
    if LIBC.unshare(NEW_MOUNTS | NEW_NAME | NEW_PROCESSES):
        raise OSError(ctypes.get_errno(), "unshare")
    first = os.fork()
    if not first:
        LIBC.prctl(SET_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
        become(json.loads(Path(sys.argv[1]).read_text()))
    code = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
    sys.exit(128 - code if code < 0 else code)


def become(spec: dict[str, Any]) -> None:
    """Become the program of a container."""
    root = make_root(spec)
    socket.sethostname(spec["hostname"])
    os.chroot(root)
    os.chdir(spec["folder"])
    os.setgroups([spec["group"]])
    os.setgid(spec["group"])
    os.setuid(spec["user"])
    LIBC.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    os.environ.clear()
    os.environ.update(spec["env"])
    os.execvp(spec["command"][0], spec["command"])


if __name__ == "__main__":
    main()

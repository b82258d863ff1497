"""What a fault does to the process that it hits, or to files of the run.

Not covered: the coordinator and its connections (`outside.py`).
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path
from typing import Any

from switokd.runs.checkpoints import stored
from tests.faults.plan import Fault

OUTSIDE = "SWITOKD_TEST_OUTSIDE"
"""Environment variable: port at which the test's own process takes orders."""

LINK = "SWITOKD_TEST_LINK"
"""Environment variable: descriptor that takes orders for the link between two hosts."""

FILE_LIMIT = 1 << 16
"""Bytes that a file may have while the disk is "full": the record fits, a checkpoint does not."""

FILLER = Path("out", "filler")


class Flags:
    """What the wrapped functions of `moments.py` do next."""

    spoil_images = False
    spoil_gradient = False
    doubled_until = 0.0


def act(fault: Fault, flags: Flags) -> None:
    """Let a fault happen to this process."""
    if fault.kind in IN_PROCESS:
        IN_PROCESS[fault.kind](fault)
    elif fault.kind == "nan-images":
        flags.spoil_images = True
    elif fault.kind == "nan-gradient":
        flags.spoil_gradient = True
    elif fault.kind == "double":
        flags.doubled_until = time.monotonic() + fault.seconds
    else:
        order(fault)


def order(fault: Fault) -> None:
    """Let the test's own process do something; returns when it is done."""
    with socket.create_connection(("127.0.0.1", int(os.environ[OUTSIDE])), timeout=10) as outside:
        outside.sendall(json.dumps({"kind": fault.kind, "seconds": fault.seconds}).encode() + b"\n")
        outside.recv(1)


def _kill(fault: Fault) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _terminate(fault: Fault) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _stop(fault: Fault) -> None:
    script = f"sleep {fault.seconds}; kill -CONT {os.getpid()}"
    subprocess.Popen(["sh", "-c", script], stdout=subprocess.DEVNULL, start_new_session=True)
    os.kill(os.getpid(), signal.SIGSTOP)


def _delay(fault: Fault) -> None:
    time.sleep(fault.seconds)


def _hold_gil(fault: Fault) -> None:
    ctypes.PyDLL(None).usleep(int(fault.seconds * 1e6))  # PyDLL: the GIL stays held


def _kill_loader(fault: Fault) -> None:
    for process in active_children()[:1]:
        process.kill()


def _kill_launcher(fault: Fault) -> None:
    os.kill(os.getppid(), signal.SIGKILL)


def _terminate_launcher(fault: Fault) -> None:
    os.kill(os.getppid(), signal.SIGTERM)


def _limit_files(fault: Fault) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, hard))
    unlimited = (resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
    timer = threading.Timer(fault.seconds, resource.setrlimit, unlimited)
    timer.daemon = True
    timer.start()


def _fill_disk(fault: Fault) -> None:
    with FILLER.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:  # full
            return


def _cut_link(fault: Fault) -> None:
    os.write(int(os.environ[LINK]), struct.pack("d", fault.seconds))


def _free_disk(fault: Fault) -> None:
    FILLER.unlink(missing_ok=True)


def _damage(change: Callable[[bytearray], Any]) -> Callable[[Fault], None]:
    def damage_and_die(fault: Fault) -> None:
        for checkpoint in stored(Path("out"))[:1]:
            file = checkpoint.path / "state.pt"
            content = bytearray(file.read_bytes())
            change(content)
            file.write_bytes(content)
        _kill(fault)

    return damage_and_die


def _flip_bit(content: bytearray) -> None:
    content[len(content) // 2] ^= 1


def _tear(content: bytearray) -> None:
    del content[len(content) // 2 :]


IN_PROCESS: dict[str, Callable[[Fault], None]] = {
    "kill": _kill,
    "terminate": _terminate,
    "stop": _stop,
    "delay": _delay,
    "hold-gil": _hold_gil,
    "kill-loader": _kill_loader,
    "kill-launcher": _kill_launcher,
    "terminate-launcher": _terminate_launcher,
    "limit-files": _limit_files,
    "fill-disk": _fill_disk,
    "free-disk": _free_disk,
    "cut-link": _cut_link,
    "flip-bit": _damage(_flip_bit),
    "tear": _damage(_tear),
}

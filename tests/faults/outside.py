"""A coordinator behind a TCP proxy that cuts, loses and delays; takes orders from the ranks.

The ranks connect to the proxy. All of it lives in threads of the test's own process, except for the
coordinator.

Not covered: packets (`hosts.py`).
"""

from __future__ import annotations

import json
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

from tests.support import environment

CONNECTION = {"cut", "lose-responses", "lose-requests", "lag", "refuse"}
COORDINATOR = {"kill-coordinator", "terminate-coordinator", "stop-coordinator"}
RESET = struct.pack("ii", 1, 0)


class Outside:
    """A coordinator with a journal, its proxy, and the port for orders."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._journal, self._log = folder / "journal.db", folder / "coordinator.log"
        self._lock = threading.Lock()
        self._port = 0
        self._child = self._start()
        self._proxy = Proxy(self._port)
        self.address = f"127.0.0.1:{self._proxy.port}"
        self._orders = socket.create_server(("127.0.0.1", 0))
        self.orders_port: int = self._orders.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    @property
    def resources(self) -> tuple[int, int]:
        """Memory of the coordinator in bytes, and number of its open descriptors."""
        with self._lock:
            process = psutil.Process(self._child.pid)
            return process.memory_info().rss, process.num_fds()

    def close(self) -> None:
        """End coordinator and proxy."""
        self._orders.close()
        self._proxy.close()
        with self._lock:
            self._child.kill()
            _wait_for_end(self._child)

    def do(self, kind: str, seconds: float) -> None:
        """Carry out an order; what lasts longer goes on after it."""
        if kind in CONNECTION:
            self._proxy.do(kind, seconds)
        elif kind == "stop-coordinator":
            self._child.send_signal(signal.SIGSTOP)
            threading.Timer(seconds, self._child.send_signal, [signal.SIGCONT]).start()
        elif kind in COORDINATOR:
            number = signal.SIGKILL if kind == "kill-coordinator" else signal.SIGTERM
            child = self._child
            child.send_signal(number)
            threading.Thread(target=self._replace, args=(child, seconds), daemon=True).start()
        else:
            raise ValueError(kind)

    def kill(self) -> None:
        """Kill the coordinator for good."""
        self._child.kill()
        _wait_for_end(self._child)

    def start_again(self) -> None:
        """Start a killed coordinator on its port and journal; returns when it is ready."""
        with self._lock:
            self._child = self._start()

    def _replace(self, child: subprocess.Popen[str], seconds: float) -> None:
        with self._lock:
            if child is self._child:  # else another fault has ended it already
                _wait_for_end(child)
                time.sleep(seconds)
                self._child = self._start()

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "switokd", "coordinator", "--port", str(self._port)]
        command += ["--http-port", "0", "--journal", str(self._journal), "--follow-stdin"]
        with self._log.open("a") as log:
            child = subprocess.Popen(
                command,
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        assert child.stdout is not None
        line = child.stdout.readline()
        if line:  # else it ended: the log says why
            self._port = int(json.loads(line)["grpc"].rpartition(":")[2])
        return child

    def _serve(self) -> None:
        while True:
            try:
                caller, _ = self._orders.accept()
            except OSError:
                return
            with caller, suppress(OSError), caller.makefile() as lines:
                order = json.loads(lines.readline())
                self.do(order["kind"], order["seconds"])
                caller.sendall(b"y")


def _wait_for_end(child: subprocess.Popen[str]) -> None:
    child.wait()
    for stream in (child.stdin, child.stdout):
        if stream:
            stream.close()


class Proxy:
    """Hands bytes on between ranks and the coordinator at a port, and disturbs them."""

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self._server = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._server.getsockname()[1]
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._is_cutting = False
        self._until = dict.fromkeys(CONNECTION, 0.0)
        threading.Thread(target=self._accept, daemon=True).start()

    def do(self, kind: str, seconds: float) -> None:
        """Disturb all connections from now on, for some seconds."""
        if kind == "cut":
            self._is_cutting = True
            return
        self._until[kind] = time.monotonic() + seconds
        if kind == "refuse":
            self._reset_all()
        if kind.startswith("lose"):  # a stream with a hole in it is of no use
            threading.Timer(seconds, self._reset_all).start()

    def close(self) -> None:
        """End all connections."""
        self._server.close()
        self._reset_all()

    def _accept(self) -> None:
        while True:
            try:
                rank, _ = self._server.accept()
            except OSError:
                return
            try:
                if self._lasts("refuse"):
                    raise ConnectionError
                coordinator = socket.create_connection(("127.0.0.1", self._upstream), timeout=5)
            except OSError:
                _reset(rank)
                continue
            coordinator.settimeout(None)
            pair = (rank, coordinator)
            self._pairs.append(pair)
            for source, target, lost in ((*pair, "lose-requests"), (*pair[::-1], "lose-responses")):
                threading.Thread(
                    target=self._pump, args=(source, target, lost, pair), daemon=True
                ).start()

    def _pump(
        self,
        source: socket.socket,
        target: socket.socket,
        lost: str,
        pair: tuple[socket.socket, socket.socket],
    ) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if self._lasts("lag"):
                    time.sleep(0.05)
                if self._is_cutting and len(data) > 1:
                    self._is_cutting = False
                    target.sendall(data[: len(data) // 2])
                    self._reset_all()
                    break
                if not self._lasts(lost):
                    target.sendall(data)
        for end in pair:
            _reset(end)
        with suppress(ValueError):
            self._pairs.remove(pair)

    def _lasts(self, kind: str) -> bool:
        return time.monotonic() < self._until[kind]

    def _reset_all(self) -> None:
        for pair in list(self._pairs):
            for end in pair:
                _reset(end)


def _reset(end: socket.socket) -> None:
    """Close a connection with RST; wakes up the thread that reads from it."""
    with suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        end.shutdown(socket.SHUT_RDWR)
    end.close()

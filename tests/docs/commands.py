"""Runs the blocks of a document, with each command of the package in a fork of the same process.

The process has imported PyTorch already (`tests/preloaded.py`), which takes longer than most
commands. This holds for the processes that the commands start as well.

Not covered: the script that pip installs as `switokd` (`tests/packaging`); new interpreters, as
which the tests of the launcher and the blocks with torchrun start the ranks.
"""

from __future__ import annotations

import fcntl
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import psutil

from tests.faults.namespaces import NEW_NETWORK, NEW_USERS, enter

WAIT_SECONDS = 90

CLIENT = """#!{python} -IS
import json, os, signal, socket, sys

name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
module = ["switokd"] if name == "switokd" else [word for word in words[:3] if word[:7] == "switokd"]
if not module:
    os.execv({python!r}, [{python!r}, *words])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
arguments = words if name == "switokd" else words[words.index(module[0]) + 1:]
files = []
for file in map(int, os.listdir("/proc/self/fd")):
    try:
        os.fstat(file)
        files += [file] if file != server.fileno() else []
    except OSError:  # the listed folder itself
        pass
socket.send_fds(server, [b"."], files)
request = [name, module[0], arguments, os.getcwd(), dict(os.environ), files]
server.sendall(json.dumps(request).encode())
server.shutdown(socket.SHUT_WR)
for file in files:  # the end of a pipe must be seen by its other side
    os.close(file)
answers = server.makefile()
process = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: os.kill(process, number))
os._exit(int(answers.readline() or 1))
"""
"""The programs `switokd` and `python`: the server runs modules of the package for them."""


def run_blocks(listed: Path, document: str, own_network: bool = False) -> None:
    """Run blocks of (language, line, code, file to wait for) in order.

    All Python blocks have the same names. own_network: no other process listens on its ports.
    """
    if own_network:
        enter(NEW_USERS | NEW_NETWORK)
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    server = _serve_commands(listed.parent)
    try:
        _run_blocks(listed, document)
    finally:
        for process in (*server.children(recursive=True), server):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _run_blocks(listed: Path, document: str) -> None:
    sys.path.insert(0, "")  # as in an interactive session
    names = {"__name__": "__main__"}
    for language, line, code, awaited in json.loads(listed.read_text()):
        _wait_for(awaited)
        first = code.partition("\n")[0]
        if first.startswith("# ") and first.endswith((".py", ".yaml")):  # a file to be written
            Path(first[2:]).write_text(code)
        elif language == "sh":
            print(f"{document}:{line}", flush=True)
            subprocess.run(["bash", "-euc", code], check=True)
        elif language == "python":
            exec(compile("\n" * line + code, document, "exec"), names)
    sys.stdout.flush()


def _wait_for(file: str) -> None:
    """Wait until a command in the background has written something into a file."""
    deadline = time.monotonic() + WAIT_SECONDS
    while file and not (Path(file).exists() and Path(file).stat().st_size):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {file} after {WAIT_SECONDS} s")
        time.sleep(0.05)


def _serve_commands(folder: Path) -> psutil.Process:
    """Put `switokd` and `python` into the search path, and start the process that runs commands.

    The process is forked now, because blocks may start threads.
    """
    address, programs = folder / "commands.sock", folder / "bin"
    programs.mkdir()
    for name in ("switokd", "python"):
        (programs / name).write_text(CLIENT.format(python=sys.executable, address=str(address)))
        (programs / name).chmod(0o755)
    os.environ["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(address))
    server.listen()
    process = os.fork()
    if process == 0:
        sys.executable = str(programs / "python")
        while True:
            client, _ = server.accept()
            if os.fork() == 0:
                server.close()
                _answer(client)
            client.close()
    server.close()
    return psutil.Process(process)


def _answer(client: socket.socket) -> None:
    """Run the module of a client, send its process id and exit code, and end this process."""
    _, received, _, _ = socket.recv_fds(client, 1, 250)
    with client.makefile() as request:
        name, module, arguments, folder, environment, numbers = json.load(request)
    child = os.fork()
    if child == 0:
        client.close()
        apart = [fcntl.fcntl(file, fcntl.F_DUPFD, 1 + max(numbers + received)) for file in received]
        for file in received:
            os.close(file)
        for file, number in zip(apart, numbers, strict=True):
            os.dup2(file, number)
            os.close(file)
        sys.stdin = open(0)  # noqa: SIM115 open until the process ends
        os.setsid()
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        if name != "switokd":
            sys.path.insert(0, folder)
        _run_module(module, arguments)
    for file in received:
        os.close(file)
    client.sendall(f"{child}\n".encode())
    _, status = os.waitpid(child, 0)
    client.sendall(f"{os.waitstatus_to_exitcode(status) % 256}\n".encode())
    os._exit(0)


def _run_module(module: str, arguments: list[str]) -> None:
    """Run `python -m MODULE ARGUMENTS` and end this process with the exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [module, *arguments]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the module is imported already
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

"""Runs the blocks of a document, with each `switokd` command in a fork of the same process.

The process has imported PyTorch already (`tests/preloaded.py`), which takes longer than most
commands. Everything that a command itself starts is a new interpreter.

Not covered: the script that pip installs as `switokd` (`tests/packaging`).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.preloaded import switokd_command

CLIENT = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [b"."], [0, 1, 2])
server.sendall(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode())
server.shutdown(socket.SHUT_WR)
os._exit(int(server.recv(9) or b"1"))
"""
"""The program `switokd` of a document's shells: the server runs its arguments."""


def run_blocks(listed: Path, document: str) -> None:
    """Run blocks of (language, line, code) in order, all Python blocks with the same names."""
    _serve_commands(listed.parent)
    sys.path.insert(0, "")  # as in an interactive session
    names = {"__name__": "__main__"}
    for language, line, code in json.loads(listed.read_text()):
        first = code.partition("\n")[0]
        if first.startswith("# ") and first.endswith((".py", ".yaml")):  # a file to be written
            Path(first[2:]).write_text(code)
        elif language == "sh":
            print(f"{document}:{line}", flush=True)
            subprocess.run(["bash", "-euc", code], check=True)
        elif language == "python":
            exec(compile("\n" * line + code, document, "exec"), names)
    sys.stdout.flush()


def _serve_commands(folder: Path) -> None:
    """Put a program `switokd` into the search path, and start the process that runs its commands.

    The process is forked now, because blocks may start threads.
    """
    address, program = folder / "commands.sock", folder / "bin" / "switokd"
    program.parent.mkdir()
    program.write_text(CLIENT.format(python=sys.executable, address=str(address)))
    program.chmod(0o755)
    os.environ["PATH"] = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(address))
    server.listen()
    if os.fork() == 0:
        while True:
            client, _ = server.accept()
            if os.fork() == 0:
                server.close()
                _answer(client)
            client.close()


def _answer(client: socket.socket) -> None:
    """Run the command of a client, send its exit code, and end this process."""
    _, streams, _, _ = socket.recv_fds(client, 1, 3)
    with client.makefile() as words:
        arguments, folder, environment = json.load(words)
    child = os.fork()
    if child == 0:
        client.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        _end(arguments)
    _, status = os.waitpid(child, 0)
    client.sendall(str(os.waitstatus_to_exitcode(status) % 256).encode())
    os._exit(0)


def _end(arguments: list[str]) -> None:
    """Run `switokd ARGUMENTS` and end this process with the exit code."""
    try:
        switokd_command(*arguments)
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

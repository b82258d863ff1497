"""Starts Python programs of this package; a folder of the user never hides the standard library.

`python -m` puts the current folder first on the import path, where a file such as queue.py hides
the module of that name. `python -P` leaves the folder out, but only from Python 3.11 on. Hence this
file is itself the program that `python_command` starts. It removes the first entry, and runs a
module.

Not covered: what runpy imports for `python -m`, before any code of this package runs; the variable
PYTHONPATH, whose folders come before the standard library by the user's choice; a fork server that
is killed, and starts again in the current folder.
"""

import os
import sys


def leaves_out_first_entry() -> bool:
    """Return whether the interpreter was told to put no folder of a program on the import path."""
    return bool(sys.flags.isolated or getattr(sys.flags, "safe_path", False))  # Python 3.11 on


if __name__ == "__main__" and not leaves_out_first_entry():
    del sys.path[0]  # this file's folder


def python_command(module: str) -> list[str]:
    """Return the command that runs a module of this package, as `python -u -m MODULE` does."""
    return [sys.executable, "-u", os.path.abspath(__file__), module]


def leave_current_folder() -> None:
    """Undo what `python -m switokd` does to the import path; does nothing in other programs.

    A run's own modules are found nevertheless: `plugins.add_import_folders` appends their folders.
    """
    if sys.argv[:1] != ["-m"] or leaves_out_first_entry():  # -m, while runpy looks for the module
        return
    module = sys.orig_argv[len(sys.orig_argv) - len(sys.argv)]  # the argument before the program's
    if module.removeprefix("-m").partition(".")[0] == "switokd" and _begins_with_current_folder():
        del sys.path[0]


def _begins_with_current_folder() -> bool:
    """Whether the folder is on the path yet: a .pth file may import this package before that."""
    try:
        return sys.path[0] in ("", os.getcwd())
    except FileNotFoundError:  # the folder was deleted
        return True


def start_fork_server() -> None:
    """Start the server that forks loader processes, before other threads need the current folder.

    multiprocessing starts it with `python -c`, which looks in the current folder first. For this
    moment that is the folder of the standard library.
    """
    from multiprocessing import forkserver

    before = os.getcwd()
    os.chdir(os.path.dirname(os.__file__))
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(before)


if __name__ == "__main__":
    import runpy

    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    if root not in sys.path:  # the parent has found the package elsewhere than on its import path
        sys.path.append(root)
    runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
